"""What the everyday rows state: things by kind, and what is true and false of whole kinds.

Every word stands in one kind only and in no question's text, so the words of test rows can be kept out of
training rows. Words with a second everyday meaning (bat, crane, organ, trunk, turkey) are left out.
"""

from __future__ import annotations

from dataclasses import dataclass

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

ANIMALS = ("bird", "small mammal", "large mammal", "fish", "insect", "reptile")
PLANTS = ("tree", "flower")
FOODS = ("fruit", "vegetable", "dish")
NO_OBJECTS = ("job", "sport", "body part", "country", "city")


@dataclass(frozen=True, kw_only=True)
class Fact:
    """Something that is true of the kinds in `yes`, unclear for those in `unclear`, and false of all others."""

    yes: tuple[str, ...]
    unclear: tuple[str, ...] = ()

    @property
    def no(self) -> tuple[str, ...]:
        return tuple(kind for kind in KINDS if kind not in self.yes and kind not in self.unclear)


@dataclass(frozen=True)
class Property(Fact):
    """`question` asks it of one thing ({x}, with its article), `choice` of several."""

    question: str
    choice: str


@dataclass(frozen=True)
class Goal(Fact):
    """A `wish` that things of the kinds in `yes` serve, and a `solution` that takes one of them ({x})."""

    wish: str
    solution: str

    @property
    def choice(self) -> str:
        return f"Someone wants to {self.wish}. Which of these will help?"


def _is_a(name: str, *yes: str, unclear: tuple[str, ...] = ()) -> Property:
    return Property(f"is {{x}} {name}?", f"Which of these is {name}?", yes=yes, unclear=unclear)


def _property(question: str, choice: str, *yes: str, unclear: tuple[str, ...] = ()) -> Property:
    return Property(question, choice, yes=yes, unclear=unclear)


def _goal(wish: str, solution: str, *yes: str, unclear: tuple[str, ...] = ()) -> Goal:
    return Goal(wish, solution, yes=yes, unclear=unclear)


# fmt: off
PROPERTIES = (
    _is_a("a kind of animal", *ANIMALS, unclear=("job",)),
    _is_a("a kind of bird", "bird"),
    _is_a("a kind of mammal", "small mammal", "large mammal", unclear=("job",)),
    _is_a("a kind of fish", "fish"),
    _is_a("a kind of insect", "insect"),
    _is_a("a kind of reptile", "reptile"),
    _is_a("a kind of fruit", "fruit", unclear=("vegetable", "dish", "drink")),
    _is_a("a kind of vegetable", "vegetable", unclear=("fruit", "dish")),
    _is_a("a kind of drink", "drink"),
    _is_a("a kind of tree", "tree", unclear=("fruit",)),
    _is_a("a kind of flower", "flower", unclear=("tree", "fruit", "vegetable")),
    _is_a("a kind of tool", "hand tool", "blade", unclear=("vessel", "pen", "lamp", "appliance", "instrument", "bag")),
    _is_a("a piece of clothing", "clothing", unclear=("footwear", "cloth", "bag")),
    _is_a("a piece of furniture", "seat", "bed", unclear=("lamp", "appliance", "vessel", "instrument", "bag")),
    _is_a("a kind of vehicle", "vehicle", unclear=("aircraft", "boat")),
    _is_a("a kind of boat", "boat"),
    _is_a("a kind of aircraft", "aircraft"),
    _is_a("a musical instrument", "instrument"),
    _is_a("a kind of metal", "metal"),
    _is_a("a kind of cloth", "cloth", unclear=("clothing",)),
    _is_a("a kind of building", "building"),
    _is_a("a kind of sport", "sport", unclear=("boat",)),
    _is_a("a part of the body", "body part"),
    _is_a("a country", "country"),
    _is_a("a city", "city"),
    _is_a("a person with a job", "job"),
    _is_a("a plant", *PLANTS, unclear=(*FOODS, "drink", "cloth", "building")),
    _is_a("a living thing", *ANIMALS, *PLANTS, unclear=(*FOODS, "cloth", *NO_OBJECTS)),
    _is_a("used for cutting", "blade", unclear=("hand tool", "appliance", "body part")),
    _is_a("used for writing", "pen", unclear=("appliance", "body part")),
    _is_a("made to hold liquids", "vessel", unclear=("appliance", "bag", "boat", "building", "body part")),
    _is_a("made to sleep on", "bed", unclear=("seat", "building", "vehicle", "boat", "clothing")),
    _property("can {x} fly?", "Which of these can fly?", "bird", "aircraft", unclear=("insect", "cloth", *NO_OBJECTS)),
    _property("does {x} have feathers?", "Which of these has feathers?", "bird",
              unclear=("bed", "clothing", *NO_OBJECTS)),
    _property("does {x} have wheels?", "Which of these has wheels?", "vehicle",
              unclear=("aircraft", "bag", "bed", "seat", "appliance", "boat", "footwear", *NO_OBJECTS)),
    _property("does {x} have legs?", "Which of these has legs?", "bird", "small mammal", "large mammal", "insect",
              unclear=("reptile", "seat", "bed", "clothing", "instrument", *NO_OBJECTS)),
    _property("does {x} have a roof?", "Which of these has a roof?", "building",
              unclear=("vehicle", "boat", *NO_OBJECTS)),
    _property("does {x} give light?", "Which of these gives light?", "lamp",
              unclear=("appliance", "insect", "vehicle", "aircraft", "boat", "building", *NO_OBJECTS)),
    _property("does {x} need electricity?", "Which of these needs electricity?", "appliance",
              unclear=("lamp", "instrument", "vehicle", "aircraft", "boat", "hand tool", "building", "vessel", *NO_OBJECTS)),
    _property("does {x} travel on water?", "Which of these travels on water?", "boat",
              unclear=(*ANIMALS, "aircraft", *NO_OBJECTS)),
    _property("does {x} live under water?", "Which of these lives under water?", "fish",
              unclear=("bird", "small mammal", "large mammal", "insect", "reptile", "boat", *NO_OBJECTS)),
    _property("can you eat {x}?", "Which of these can you eat?", *FOODS,
              unclear=(*ANIMALS, *PLANTS, "drink", "body part")),
    _property("can you drink {x}?", "Which of these can you drink?", "drink", unclear=("fruit",)),
    _property("can you wear {x}?", "Which of these can you wear?", "clothing", "footwear",
              unclear=("cloth", "metal", "flower", "bag", "lamp")),
    _property("do you wear {x} on your foot?", "Which of these is worn on the foot?", "footwear",
              unclear=("clothing", "cloth")),
    _property("would you sit on {x} at dinner?", "Which of these would you sit on at dinner?", "seat",
              unclear=("bed", "large mammal", "vessel", "bag")),
    _property("can you carry books in {x}?", "In which of these can you carry books?", "bag",
              unclear=("vessel", "vehicle", "aircraft", "boat", "clothing", "body part")),
    _property("can you play music on {x}?", "On which of these can you play music?", "instrument",
              unclear=("appliance", "blade", "vessel")),
    _property("can people travel in {x}?", "In which of these can people travel?", "vehicle", "aircraft", "boat",
              unclear=("seat", "bed", "bag", *NO_OBJECTS)),
)

# What true-or-false rows ask: few properties, each of them often, which is what a small model learns in minutes.
ASKED = tuple(
    fact
    for fact in PROPERTIES
    if fact.question.format(x="it") in (
        "is it a kind of animal?", "is it a kind of fruit?", "is it a kind of tool?", "is it a piece of clothing?",
        "is it a piece of furniture?", "is it a musical instrument?", "is it a part of the body?", "is it a country?",
        "is it a person with a job?", "is it a kind of building?", "is it a living thing?", "can you eat it?",
        "can you drink it?", "can you wear it?", "can people travel in it?",
    )
)
GOALS = (
    _goal("cut a piece of rope", "Use {x}.", "blade", unclear=("hand tool", "appliance", "metal")),
    _goal("write a letter", "Use {x}.", "pen", unclear=("appliance",)),
    _goal("see in a dark cellar", "Use {x}.", "lamp", unclear=("appliance",)),
    _goal("bring some water to a thirsty dog", "Use {x}.", "vessel", unclear=("bag", "footwear", "boat", "vehicle")),
    _goal("take books to school", "Use {x}.", "bag", unclear=("vessel", "vehicle", "boat", "clothing", "large mammal")),
    _goal("rest tired legs", "Sit on {x}.", "seat", unclear=("bed", "vehicle", "boat", "vessel", "bag", "large mammal")),
    _goal("lie down for the night", "Use {x}.", "bed", unclear=("seat", "building", "vehicle", "boat", "cloth")),
    _goal("get dressed on a cold day", "Put on {x}.", "clothing",
          unclear=("footwear", "lamp", "appliance", "vessel", "cloth")),
    _goal("walk over sharp stones", "Put on {x}.", "footwear",
          unclear=("clothing", "lamp", "appliance", "vessel", "cloth")),
    _goal("play a song for some friends", "Use {x}.", "instrument", unclear=("appliance", "vessel")),
    _goal("get to a village far away", "Take {x}.", "vehicle", unclear=("aircraft", "boat", "large mammal", "bag")),
    _goal("cross a wide lake", "Take {x}.", "boat", unclear=("aircraft", "vehicle")),
    _goal("travel above the clouds", "Take {x}.", "aircraft"),
    _goal("make a sweet salad", "Use {x}.", "fruit", unclear=("vegetable", "dish", "drink", "flower", "vessel", "blade")),
    _goal("cook a thick soup", "Add {x}.", "vegetable", unclear=("fruit", "dish", "drink", *ANIMALS)),
    _goal("quench a thirst", "Have {x}.", "drink", unclear=("fruit", "vegetable", "dish", "vessel", "appliance")),
    _goal("have a quick lunch", "Eat {x}.", "dish", unclear=("fruit", "vegetable", "drink", *ANIMALS)),
    _goal("bring color to a garden", "Plant {x}.", "flower", unclear=("tree", "fruit", "vegetable")),
    _goal("repair a wooden fence", "Use {x}.", "hand tool", unclear=("blade", "metal", "tree", "job")),
    _goal("become fitter", "Try {x}.", "sport", unclear=("boat", "footwear", "fruit", "vegetable", "drink", "hand tool")),
    _goal("get out of a storm", "Go into {x}.", "building", unclear=("vehicle", "boat", "aircraft", "country", "city")),
    _goal("sew new curtains", "Use {x}.", "cloth", unclear=("clothing", "appliance", "job", "blade")),
    _goal("make a coin", "Use {x}.", "metal", unclear=("hand tool", "appliance", "job", "blade")),
    _goal("find shade in a park", "Sit under {x}.", "tree",
          unclear=("building", "lamp", "boat", "vehicle", "aircraft", "seat", "cloth")),
)
# fmt: on

# From small to large: of two groups, whichever words are taken, one thing is smaller than the other.
SIZES = (("insect",), ("fruit",), ("seat", "large mammal"), ("building",))
