"""The things that everyday rows are about, by kind.

Every word stands in one kind only and in no question's text, so the words of test rows can be kept out of
training rows. Words with a second everyday meaning (bat, crane, organ, trunk, turkey) are left out.
"""

from __future__ import annotations

KINDS: dict[str, tuple[str, ...]] = {
    kind: tuple(words.split())
    for kind, words in {
        "bird": (
            "robin eagle sparrow pigeon owl parrot crow swan seagull hawk woodpecker stork canary raven "
            "finch falcon magpie heron nightingale vulture"
        ),
        "small mammal": (
            "mouse hamster squirrel rabbit hedgehog rat weasel chipmunk ferret hare otter raccoon skunk "
            "badger fox cat"
        ),
        "large mammal": (
            "elephant giraffe hippopotamus rhinoceros buffalo moose camel horse bison bear gorilla zebra "
            "lion tiger cow donkey"
        ),
        "fish": (
            "salmon trout tuna cod shark herring carp sardine haddock mackerel piranha minnow halibut "
            "anchovy flounder sturgeon"
        ),
        "insect": (
            "ant bee wasp beetle butterfly mosquito moth grasshopper ladybug dragonfly cockroach termite "
            "flea locust hornet caterpillar"
        ),
        "reptile": (
            "snake lizard crocodile turtle tortoise alligator python cobra gecko chameleon iguana viper "
            "rattlesnake anaconda"
        ),
        "fruit": (
            "apple banana pear plum peach cherry grape mango lemon melon strawberry apricot pineapple "
            "raspberry blueberry papaya watermelon grapefruit blackberry nectarine"
        ),
        "vegetable": (
            "carrot potato onion cabbage turnip radish beet leek parsnip cauliflower lettuce yam artichoke "
            "shallot rutabaga"
        ),
        "dish": (
            "pizza sandwich omelette pancake pie biscuit waffle muffin burger doughnut sausage croissant "
            "cupcake pretzel taco lasagna"
        ),
        "drink": (
            "milk tea coffee lemonade cocoa cider beer wine cola champagne espresso cappuccino whiskey rum"
        ),
        "tree": (
            "oak pine birch maple willow elm beech cedar spruce poplar sycamore fir redwood larch cypress"
        ),
        "flower": (
            "rose tulip daisy lily daffodil sunflower orchid poppy carnation marigold peony crocus hyacinth "
            "dandelion primrose"
        ),
        "hand tool": (
            "hammer screwdriver wrench drill chisel crowbar mallet sander shovel spade rake pickaxe trowel"
        ),
        "blade": "knife saw axe razor scalpel hatchet cleaver dagger sickle scythe machete",
        "vessel": "cup mug jug bottle bucket bowl teapot flask kettle barrel goblet thermos",
        "bag": "backpack suitcase handbag rucksack briefcase satchel purse tote basket duffel",
        "pen": "pencil crayon marker quill highlighter ballpoint biro stylus",
        "lamp": "candle torch lantern flashlight chandelier headlamp spotlight floodlight lightbulb",
        "seat": "chair stool bench sofa armchair couch throne pew recliner",
        "bed": "hammock mattress crib bunk futon cradle cot",
        "clothing": (
            "shirt coat jacket sweater scarf glove skirt cardigan blouse hoodie mitten vest cloak raincoat "
            "sweatshirt"
        ),
        "footwear": "shoe boot sandal slipper sneaker clog moccasin loafer",
        "vehicle": "car bus truck van taxi motorcycle tractor ambulance minibus jeep limousine lorry",
        "aircraft": "helicopter airplane jet glider airliner biplane",
        "boat": "canoe yacht kayak ferry raft sailboat rowboat dinghy gondola barge catamaran",
        "instrument": (
            "guitar piano violin trumpet drum flute cello harp banjo clarinet saxophone trombone ukulele "
            "accordion tuba oboe mandolin xylophone"
        ),
        "appliance": (
            "refrigerator toaster television computer radio microwave dishwasher printer laptop blender "
            "freezer"
        ),
        "metal": "iron steel copper gold silver brass bronze aluminum zinc platinum nickel titanium",
        "cloth": "cotton wool silk linen velvet denim nylon polyester cashmere satin",
        "building": (
            "house church castle library hotel museum hospital factory palace cathedral warehouse mosque "
            "skyscraper cottage barn temple bungalow mansion"
        ),
        "job": (
            "doctor teacher baker farmer nurse plumber carpenter pilot dentist lawyer butcher tailor "
            "gardener chef firefighter mechanic electrician librarian soldier surgeon"
        ),
        "sport": (
            "football tennis basketball hockey rugby swimming golf volleyball badminton boxing skiing "
            "baseball wrestling gymnastics judo"
        ),
        "body part": "nose ear elbow knee shoulder finger toe ankle wrist thumb chin neck tongue eyebrow hip",
        "country": (
            "France Spain Italy Germany India Japan Brazil Canada Egypt Kenya Norway Sweden Poland Greece "
            "Peru Portugal Ireland Australia"
        ),
        "city": (
            "Paris London Rome Tokyo Berlin Madrid Moscow Chicago Boston Vienna Dublin Cairo Sydney Seattle"
        ),
    }.items()
}
WITHOUT_ARTICLE = ("drink", "metal", "cloth", "sport", "country", "city")
SOUNDS_LIKE_Y = ("ukulele",)  # begins with a vowel letter, takes "a"
