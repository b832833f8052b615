"""The words of the little world. Plain lists; nothing here draws random numbers."""

from __future__ import annotations

GIRLS = (
    "Ada Alice Amina Anna Aya Bella Carla Clara Dana Dora Elena Ella Emma Eva Fatima Fiona Grace Greta Hana Helen Ida Ines Iris"
    " Ivy Jana Julia Kate Kira Lara Lena Lily Lina Lucy Luna Maria Maya Mei Mia Mina Molly Nadia Nina Nora Olga Olive Paula Petra"
    " Pia Rita Rosa Ruby Sara Selma Sofia Stella Tara Tess Vera Wanda Yara Zoe"
).split()
BOYS = (
    "Adam Alan Ali Amir Anton Ben Bruno Carl Chen Dan David Diego Emil Eric Felix Finn Frank George Hans Henry Hugo Ian Igor Ivan"
    " Jack Jan Jim John Jonas Karl Kenji Kofi Lars Leo Leon Liam Louis Luca Marco Mark Max Milo Nick Nils Noah Oleg Omar Oscar Otto"
    " Pablo Paul Peter Rafi Ravi Sam Sven Theo Tim Tom Victor Walter Yusuf"
).split()
NAMES = GIRLS + BOYS
TOWNS = (
    "Ashford Birchwood Blackpool Bridgeton Clearwater Cliffside Deepwell Eastport Elmdale Fairview Foxhill Glenbrook Greenfield"
    " Hazelton Highgate Ironbridge Kingsley Lakeview Limestone Longmeadow Maplewood Millbrook Newhaven Norwick Oakridge Oldtown"
    " Pinecrest Redhill Riverton Rosedale Sandport Silverton Southgate Springvale Stonebridge Sunfield Thornbury Westbrook"
    " Whitecliff Windmere"
).split()
COLOURS = "red blue green yellow black white brown pink orange purple grey silver golden".split()
ANIMALS = (
    "dog cat bird fish rabbit horse cow pig sheep duck hen frog mouse fox bear wolf owl goat lion tiger turtle parrot hamster donkey snake bee"
).split()
PETS = "dog cat bird fish rabbit hamster turtle parrot mouse snake horse goat duck hen frog".split()
OBJECTS = (
    "cup plate bowl spoon fork pot lamp chair table box bag ball book pen pencil hat coat shirt sock scarf glove blanket pillow"
    " towel candle bottle basket key clock mirror rope kite drum bell coin ring brush bucket ladder hammer wheel toy doll boat flag tent"
).split()
FOODS = "apple pear plum banana orange lemon carrot potato onion tomato egg cake cookie pie sandwich bun pancake melon peach nut".split()
FRUITS = "apple pear plum banana orange lemon melon peach cherry grape".split()
VEGETABLES = "carrot potato onion tomato bean pea cabbage pepper".split()
DRINKS = "water milk tea coffee juice lemonade".split()
JOBS = (
    "baker teacher doctor farmer painter singer driver gardener nurse pilot cook writer carpenter fisherman tailor dancer builder dentist librarian shepherd"
).split()
PLACES = "park forest garden river lake school market beach farm hill library kitchen village street bridge field station shop".split()
INSTRUMENTS = "piano guitar violin flute drum trumpet harp".split()
SPORTS = "football tennis chess swimming running dancing cycling skating fishing climbing".split()
DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
MONTHS = "January February March April May June July August September October November December".split()
WEATHER = "sunny rainy windy cloudy cold warm snowy foggy".split()
MOODS = "happy sad tired hungry brave shy angry proud scared excited lonely calm".split()
SIZES = "big small tiny little huge long short old new".split()
NUMBERS = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen nineteen twenty"
).split()
OPPOSITES = (
    "big small|hot cold|day night|up down|open closed|happy sad|fast slow|old new|tall short|full empty|hard soft|wet dry|light dark"
    "|loud quiet|early late|clean dirty|rich poor|left right|first last|strong weak|heavy light|long short|good bad|near far"
).split("|")
COLOUR_OF = {
    "grass": "green", "snow": "white", "the sky": "blue", "a lemon": "yellow", "coal": "black", "blood": "red", "milk": "white",
    "a carrot": "orange", "chocolate": "brown", "a tomato": "red", "a banana": "yellow", "a leaf": "green", "an elephant": "grey",
}  # fmt: skip
SOUNDS = {
    "dog": "woof", "cat": "meow", "cow": "moo", "duck": "quack", "sheep": "baa", "frog": "croak", "lion": "roar", "owl": "hoot",
    "bee": "buzz", "pig": "oink", "mouse": "squeak", "snake": "hiss",
}  # fmt: skip
HOMES = {
    "bird": "nest", "bee": "hive", "fox": "den", "dog": "kennel", "horse": "stable", "fish": "sea", "bear": "cave", "king": "castle",
    "pig": "sty", "spider": "web",
}  # fmt: skip
PLAIN = (
    "stone tree cloud moon star sun rain wind fire sand leaf root hill road door wall window floor bread salt sugar honey paper glass"
    " metal wood gold iron silk wool corn rice seed flower rose lily grass river ocean island storm winter summer spring autumn night"
    " morning music song dance story letter number circle square line point corner garden forest desert mountain valley village city"
    " tower castle bridge tunnel engine train plane ship rocket robot planet comet shadow mirror silver copper amber coral pearl"
    " tiger eagle falcon dragon whale dolphin spider butter pepper ginger lemon mango cherry velvet marble pebble anchor compass"
    " lantern feather button needle thread hammer ladder saddle helmet shield arrow violin trumpet harbor meadow orchard"
).split()
SYLLABLES = (
    "ba be bi bo bu da de di do du fa fe fi fo ga ge go ka ke ki ko ku la le li lo lu ma me mi mo mu na ne ni no nu pa pe pi po ra re ri ro ru"
    " sa se si so su ta te ti to tu va ve vi vo za ze zi zo sha cho thi bra cre dri flo gra kri plo stu tra"
).split()
IRREGULAR = {
    "mouse": "mice", "sheep": "sheep", "fish": "fish", "goose": "geese", "child": "children", "foot": "feet", "knife": "knives",
    "leaf": "leaves", "wolf": "wolves", "man": "men", "woman": "women", "tooth": "teeth", "fisherman": "fishermen", "scarf": "scarves",
}  # fmt: skip


def plural(noun: str) -> str:
    """``cup`` -> ``cups``, ``fox`` -> ``foxes``, ``mouse`` -> ``mice``."""
    if noun in IRREGULAR:
        return IRREGULAR[noun]
    if noun.endswith(("s", "x", "ch", "sh")) or noun in {"potato", "tomato"}:
        return noun + "es"
    if noun.endswith("y") and noun[-2] not in "aeiou":
        return noun[:-1] + "ies"
    return noun + "s"


def article(word: str) -> str:
    """``a`` or ``an``, with the word."""
    return ("an " if word[0] in "aeiou" else "a ") + word


def listed(parts: list[str]) -> str:
    """``a``, ``a and b``, ``a, b and c``."""
    return parts[0] if len(parts) == 1 else ", ".join(parts[:-1]) + " and " + parts[-1]


def word_list() -> str:
    """The words that are asked for and answered with, as lines for the tokenizer: with a space in front and, the singular, without."""
    countable = ANIMALS + OBJECTS + FOODS
    single = (
        NAMES + TOWNS + COLOURS + countable + DRINKS + JOBS + INSTRUMENTS + SPORTS + DAYS + MONTHS + NUMBERS + PLAIN
    )
    words = list(dict.fromkeys(single))
    return "\n".join([*words, *(" " + word for word in dict.fromkeys([*words, *map(plural, countable)]))])
