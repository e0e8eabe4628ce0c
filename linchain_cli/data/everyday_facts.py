"""What the everyday rows state: what is true, and what is false, of whole kinds of things."""

from __future__ import annotations

from dataclasses import dataclass

from linchain_cli.data.everyday_words import KINDS

ANIMALS = ("bird", "small mammal", "large mammal", "fish", "insect", "reptile")
PLANTS = ("tree", "flower")
FOODS = ("fruit", "vegetable", "dish")
NO_OBJECTS = ("job", "sport", "body part", "country", "city")


@dataclass(frozen=True, kw_only=True)
class Fact:
    """Something that is true of the kinds in `yes`, unclear for those in `unclear`, false of all others."""

    yes: tuple[str, ...]
    unclear: tuple[str, ...] = ()

    @property
    def no(self) -> tuple[str, ...]:
        return tuple(kind for kind in KINDS if kind not in self.yes and kind not in self.unclear)


@dataclass(frozen=True)
class Property(Fact):
    """`question` asks it of one thing ({x}, with its article), `choice` of several.

    True-or-false rows take only those that are `asked`: few properties, each of them often, is what a small
    model learns in minutes.
    """

    question: str
    choice: str
    asked: bool = False


@dataclass(frozen=True)
class Goal(Fact):
    """A `wish` that things of the kinds in `yes` serve, and a `solution` that takes one of them ({x})."""

    wish: str
    solution: str

    @property
    def choice(self) -> str:
        return f"Someone wants to {self.wish}. Which of these will help?"


def _is_a(name: str, *yes: str, unclear: tuple[str, ...] = (), asked: bool = False) -> Property:
    return Property(f"is {{x}} {name}?", f"Which of these is {name}?", asked, yes=yes, unclear=unclear)


def _property(
    question: str, choice: str, *yes: str, unclear: tuple[str, ...] = (), asked: bool = False
) -> Property:
    return Property(question, choice, asked, yes=yes, unclear=unclear)


def _goal(wish: str, solution: str, *yes: str, unclear: tuple[str, ...] = ()) -> Goal:
    return Goal(wish, solution, yes=yes, unclear=unclear)


PROPERTIES = (
    _is_a("a kind of animal", *ANIMALS, unclear=("job",), asked=True),
    _is_a("a kind of bird", "bird"),
    _is_a("a kind of mammal", "small mammal", "large mammal", unclear=("job",)),
    _is_a("a kind of fish", "fish"),
    _is_a("a kind of insect", "insect"),
    _is_a("a kind of reptile", "reptile"),
    _is_a("a kind of fruit", "fruit", unclear=("vegetable", "dish", "drink"), asked=True),
    _is_a("a kind of vegetable", "vegetable", unclear=("fruit", "dish")),
    _is_a("a kind of drink", "drink"),
    _is_a("a kind of tree", "tree", unclear=("fruit",)),
    _is_a("a kind of flower", "flower", unclear=("tree", "fruit", "vegetable")),
    _is_a(
        "a kind of tool",
        "hand tool",
        "blade",
        unclear=("vessel", "pen", "lamp", "appliance", "instrument", "bag"),
        asked=True,
    ),
    _is_a("a piece of clothing", "clothing", unclear=("footwear", "cloth", "bag"), asked=True),
    _is_a(
        "a piece of furniture",
        "seat",
        "bed",
        unclear=("lamp", "appliance", "vessel", "instrument", "bag"),
        asked=True,
    ),
    _is_a("a kind of vehicle", "vehicle", unclear=("aircraft", "boat")),
    _is_a("a kind of boat", "boat"),
    _is_a("a kind of aircraft", "aircraft"),
    _is_a("a musical instrument", "instrument", asked=True),
    _is_a("a kind of metal", "metal"),
    _is_a("a kind of cloth", "cloth", unclear=("clothing",)),
    _is_a("a kind of building", "building", asked=True),
    _is_a("a kind of sport", "sport", unclear=("boat",)),
    _is_a("a part of the body", "body part", asked=True),
    _is_a("a country", "country", asked=True),
    _is_a("a city", "city"),
    _is_a("a person with a job", "job", asked=True),
    _is_a("a plant", *PLANTS, unclear=(*FOODS, "drink", "cloth", "building")),
    _is_a("a living thing", *ANIMALS, *PLANTS, unclear=(*FOODS, "cloth", *NO_OBJECTS), asked=True),
    _is_a("used for cutting", "blade", unclear=("hand tool", "appliance", "body part")),
    _is_a("used for writing", "pen", unclear=("appliance", "body part")),
    _is_a("made to hold liquids", "vessel", unclear=("appliance", "bag", "boat", "building", "body part")),
    _is_a("made to sleep on", "bed", unclear=("seat", "building", "vehicle", "boat", "clothing")),
    _property(
        "can {x} fly?",
        "Which of these can fly?",
        "bird",
        "aircraft",
        unclear=("insect", "cloth", *NO_OBJECTS),
    ),
    _property(
        "does {x} have feathers?",
        "Which of these has feathers?",
        "bird",
        unclear=("bed", "clothing", *NO_OBJECTS),
    ),
    _property(
        "does {x} have wheels?",
        "Which of these has wheels?",
        "vehicle",
        unclear=("aircraft", "bag", "bed", "seat", "appliance", "boat", "footwear", *NO_OBJECTS),
    ),
    _property(
        "does {x} have legs?",
        "Which of these has legs?",
        "bird",
        "small mammal",
        "large mammal",
        "insect",
        unclear=("reptile", "seat", "bed", "clothing", "instrument", *NO_OBJECTS),
    ),
    _property(
        "does {x} have a roof?",
        "Which of these has a roof?",
        "building",
        unclear=("vehicle", "boat", *NO_OBJECTS),
    ),
    _property(
        "does {x} give light?",
        "Which of these gives light?",
        "lamp",
        unclear=("appliance", "insect", "vehicle", "aircraft", "boat", "building", *NO_OBJECTS),
    ),
    _property(
        "does {x} need electricity?",
        "Which of these needs electricity?",
        "appliance",
        unclear=(
            "lamp",
            "instrument",
            "vehicle",
            "aircraft",
            "boat",
            "hand tool",
            "building",
            "vessel",
            *NO_OBJECTS,
        ),
    ),
    _property(
        "does {x} travel on water?",
        "Which of these travels on water?",
        "boat",
        unclear=(*ANIMALS, "aircraft", *NO_OBJECTS),
    ),
    _property(
        "does {x} live under water?",
        "Which of these lives under water?",
        "fish",
        unclear=("bird", "small mammal", "large mammal", "insect", "reptile", "boat", *NO_OBJECTS),
    ),
    _property(
        "can you eat {x}?",
        "Which of these can you eat?",
        *FOODS,
        unclear=(*ANIMALS, *PLANTS, "drink", "body part"),
        asked=True,
    ),
    _property("can you drink {x}?", "Which of these can you drink?", "drink", unclear=("fruit",), asked=True),
    _property(
        "can you wear {x}?",
        "Which of these can you wear?",
        "clothing",
        "footwear",
        unclear=("cloth", "metal", "flower", "bag", "lamp"),
        asked=True,
    ),
    _property(
        "do you wear {x} on your foot?",
        "Which of these is worn on the foot?",
        "footwear",
        unclear=("clothing", "cloth"),
    ),
    _property(
        "would you sit on {x} at dinner?",
        "Which of these would you sit on at dinner?",
        "seat",
        unclear=("bed", "large mammal", "vessel", "bag"),
    ),
    _property(
        "can you carry books in {x}?",
        "In which of these can you carry books?",
        "bag",
        unclear=("vessel", "vehicle", "aircraft", "boat", "clothing", "body part"),
    ),
    _property(
        "can you play music on {x}?",
        "On which of these can you play music?",
        "instrument",
        unclear=("appliance", "blade", "vessel"),
    ),
    _property(
        "can people travel in {x}?",
        "In which of these can people travel?",
        "vehicle",
        "aircraft",
        "boat",
        unclear=("seat", "bed", "bag", *NO_OBJECTS),
        asked=True,
    ),
)

GOALS = (
    _goal("cut a piece of rope", "to use {x}", "blade", unclear=("hand tool", "appliance", "metal")),
    _goal("write a letter", "to use {x}", "pen", unclear=("appliance",)),
    _goal("see in a dark cellar", "to use {x}", "lamp", unclear=("appliance",)),
    _goal(
        "bring some water to a thirsty dog",
        "to use {x}",
        "vessel",
        unclear=("bag", "footwear", "boat", "vehicle"),
    ),
    _goal(
        "take books to school",
        "to use {x}",
        "bag",
        unclear=("vessel", "vehicle", "boat", "clothing", "large mammal"),
    ),
    _goal(
        "rest tired legs",
        "to sit on {x}",
        "seat",
        unclear=("bed", "vehicle", "boat", "vessel", "bag", "large mammal"),
    ),
    _goal(
        "lie down for the night",
        "to use {x}",
        "bed",
        unclear=("seat", "building", "vehicle", "boat", "cloth"),
    ),
    _goal(
        "get dressed on a cold day",
        "to put on {x}",
        "clothing",
        unclear=("footwear", "lamp", "appliance", "vessel", "cloth"),
    ),
    _goal(
        "walk over sharp stones",
        "to put on {x}",
        "footwear",
        unclear=("clothing", "lamp", "appliance", "vessel", "cloth"),
    ),
    _goal("play a song for some friends", "to use {x}", "instrument", unclear=("appliance", "vessel")),
    _goal(
        "get to a village far away",
        "to take {x}",
        "vehicle",
        unclear=("aircraft", "boat", "large mammal", "bag"),
    ),
    _goal("cross a wide lake", "to take {x}", "boat", unclear=("aircraft", "vehicle")),
    _goal("travel above the clouds", "to take {x}", "aircraft"),
    _goal(
        "make a sweet salad",
        "to use {x}",
        "fruit",
        unclear=("vegetable", "dish", "drink", "flower", "vessel", "blade"),
    ),
    _goal("cook a thick soup", "to add {x}", "vegetable", unclear=("fruit", "dish", "drink", *ANIMALS)),
    _goal(
        "quench a thirst",
        "to have {x}",
        "drink",
        unclear=("fruit", "vegetable", "dish", "vessel", "appliance"),
    ),
    _goal("have a quick lunch", "to eat {x}", "dish", unclear=("fruit", "vegetable", "drink", *ANIMALS)),
    _goal("bring color to a garden", "to plant {x}", "flower", unclear=("tree", "fruit", "vegetable")),
    _goal("repair a wooden fence", "to use {x}", "hand tool", unclear=("blade", "metal", "tree", "job")),
    _goal(
        "become fitter",
        "to try {x}",
        "sport",
        unclear=("boat", "footwear", "fruit", "vegetable", "drink", "hand tool"),
    ),
    _goal(
        "get out of a storm",
        "to go into {x}",
        "building",
        unclear=("vehicle", "boat", "aircraft", "country", "city"),
    ),
    _goal("sew new curtains", "to use {x}", "cloth", unclear=("clothing", "appliance", "job", "blade")),
    _goal("make a coin", "to use {x}", "metal", unclear=("hand tool", "appliance", "job", "blade")),
    _goal(
        "find shade in a park",
        "to sit under {x}",
        "tree",
        unclear=("building", "lamp", "boat", "vehicle", "aircraft", "seat", "cloth"),
    ),
)

# From small to large: of two groups, whichever words are taken, one thing is smaller than the other.
SIZES = (("insect",), ("fruit",), ("seat", "large mammal"), ("building",))
