"""The text that the embedded base is trained on: a little world, made by a seeded generator.

`documents(seed)` yields documents without end. A document may hold the marks ``<user>``, ``<assistant>``, ``<system>`` and
``<eos>``, which the tokenizer reads as single tokens. Most families ask for something that only the document itself can
answer, so that the model learns to look it up in its context and copy it. This module knows neither tokenizer nor model.
"""

from __future__ import annotations

import random
import string
from collections.abc import Callable, Iterator

from passages import order, profile, secret
from stories import dialogue, story
from words import (
    ANIMALS,
    BOYS,
    COLOUR_OF,
    COLOURS,
    DAYS,
    DRINKS,
    FOODS,
    FRUITS,
    GIRLS,
    HOMES,
    JOBS,
    MONTHS,
    NAMES,
    NUMBERS,
    OBJECTS,
    OPPOSITES,
    PLAIN,
    SOUNDS,
    SYLLABLES,
    TOWNS,
    VEGETABLES,
    article,
    listed,
    plural,
)  # fmt: skip

Rng = random.Random
EVERYTHING = ANIMALS + OBJECTS + FOODS + PLAIN + COLOURS


def syllables(rng: Rng) -> str:
    """A word that does not exist, of two to four syllables."""
    return "".join(rng.choice(SYLLABLES) for _ in range(rng.randint(2, 4)))


def thing(rng: Rng) -> str:
    """Something to copy: a word, a name, an invented word, a code of letters, digits or signs, or any characters."""
    kind = rng.random()
    if kind < 0.45:
        return rng.choice(EVERYTHING)
    if kind < 0.57:
        return rng.choice(NAMES + TOWNS)
    if kind < 0.70:
        return rng.choice((syllables(rng), syllables(rng).capitalize()))
    if kind < 0.80:
        return "".join(rng.choice(string.digits) for _ in range(rng.randint(2, 6)))
    if kind < 0.89:
        return "".join(rng.choice(string.ascii_lowercase) for _ in range(rng.randint(2, 6)))
    if kind < 0.94:
        return "".join(rng.choice(string.ascii_uppercase + string.digits) for _ in range(rng.randint(2, 6)))
    if kind < 0.99:
        return "".join(rng.choice(string.punctuation.replace("<", "")) for _ in range(rng.randint(1, 4)))
    block = rng.choice(((0xC0, 0xFF), (0x391, 0x3A1), (0x410, 0x44F), (0x4E00, 0x9FA5), (0x1F600, 0x1F64F)))
    return "".join(chr(rng.randint(*block)) for _ in range(rng.randint(1, 3)))


def repeat(rng: Rng) -> str:
    """Say the same again, in one of several forms."""
    items = [thing(rng) for _ in range(rng.randint(1, 9))]
    text = rng.choice((" ", " ", ", ", " - ", " | ", "; ", "\n")).join(items)
    form = rng.randrange(7)
    if form == 0:
        return f"Repeat: {text}\n{text}"
    if form == 1:
        return f"<user>Repeat this: {text}<assistant>{text}"
    if form == 2:
        return f'<user>Say "{text}".<assistant>{text}'
    if form == 3:
        return f"Copy this line two times.\n{text}\n{text}\n{text}"
    if form == 4:
        name = rng.choice(NAMES)
        return f'{name} said: "{text}" What did {name} say? "{text}"'
    if form == 5:
        return f'<user>Write in quotes: {text}<assistant>"{text}"'
    return f"<user>{text}\nWrite it again.<assistant>{text}"


def lookup(rng: Rng) -> str:
    """Pairs of a key and a value, then questions for some of the keys."""
    kind = rng.choice(
        (
            lambda: thing(rng),
            lambda: rng.choice(NAMES),
            lambda: rng.choice(PLAIN + OBJECTS),
            lambda: rng.choice(string.ascii_uppercase),
        )
    )
    keys = list(dict.fromkeys(kind() for _ in range(rng.randint(2, 7))))
    pairs = {key: thing(rng) for key in keys}
    sign = rng.choice((": ", " = ", " -> ", " is ", " - "))
    text = rng.choice(("\n", "; ", ", ", " | ")).join(key + sign + value for key, value in pairs.items())
    asked = rng.sample(keys, min(len(keys), rng.randint(1, 3)))
    if rng.random() < 0.5:
        head = rng.choice(("Look at this list.\n", "Here are some pairs:\n", ""))
        ask = rng.choice(("What is {}?", "Find {}.", "Which value has {}?"))
        turns = "<eos>".join(
            f"<user>{head if i == 0 else ''}{text if i == 0 else ''}{chr(10) if i == 0 else ''}{ask.format(key)}<assistant>{pairs[key]}"
            for i, key in enumerate(asked)
        )
        return turns
    return text + "\n\n" + "\n".join(key + sign + pairs[key] for key in asked)


def pick(rng: Rng) -> str:
    """First, last, next and count in a short list of words."""
    items = rng.sample(EVERYTHING, rng.randint(3, 8))
    where = rng.randrange(len(items) - 1)
    task, answer = rng.choice(
        (
            ("What is the first word?", items[0]),
            ("What is the last word?", items[-1]),
            (f"Which word comes after {items[where]}?", items[where + 1]),
            (f"Which word comes before {items[where + 1]}?", items[where]),
            ("How many words are there?", NUMBERS[len(items)]),
            ("Write the words with commas.", ", ".join(items)),
            ("Write one word on each line.", "\n".join(items)),
            ("Write the words in quotes.", " ".join(f'"{item}"' for item in items)),
            ("Number the words.", "\n".join(f"{i}. {item}" for i, item in enumerate(items, 1))),
        )
    )
    return f"<user>{' '.join(items)}\n{task}<assistant>{answer}"


def spelling(rng: Rng) -> str:
    """Words and their letters, and words in capital letters."""
    word = rng.choice((rng.choice(EVERYTHING), rng.choice(NAMES), syllables(rng)))
    sign = rng.choice(("-", " ", ", "))
    form = rng.randrange(5)
    if form == 0:
        return f"<user>How do you spell {word}?<assistant>{sign.join(word)}"
    if form == 1:
        return f"The word {word} is spelled {sign.join(word)}. It has {NUMBERS[len(word)]} letters."
    if form == 2:
        return f"<user>Which word is {sign.join(word)}?<assistant>{word}"
    if form == 3:
        return f"<user>Write {word} in capital letters.<assistant>{word.upper()}"
    return f"<user>What is the first letter of {word}?<assistant>{word[0]}"


def counting(rng: Rng) -> str:
    """Counting up and down, in digits and in words, and numbers written both ways."""
    form = rng.randrange(5)
    if form == 0:
        step, start = rng.choice((1, 1, 1, 2, 5, 10)), rng.randint(0, 60)
        numbers = [start + step * i for i in range(rng.randint(5, 15))]
        return f"Count by {step}s: " * (step > 1) + ", ".join(map(str, numbers[:: rng.choice((1, 1, -1))])) + "."
    if form == 1:
        start = rng.randint(0, 10)
        words = NUMBERS[start : start + rng.randint(4, 11)]
        return "Count: " + ", ".join(words[:: rng.choice((1, 1, -1))]) + "."
    if form == 2:
        some = rng.sample(range(21), 4)
        return " ".join(f"{NUMBERS[n].capitalize()} is {n}." for n in some)
    if form == 3:
        n = rng.randint(0, 20)
        question, answer = rng.choice(((f"{NUMBERS[n]} in digits", str(n)), (f"{n} in words", NUMBERS[n])))
        return f"<user>Write {question}.<assistant>{answer}"
    one, other = rng.sample(range(21), 2)
    return f"<user>Which number is bigger, {one} or {other}?<assistant>{max(one, other)}"


def sums(rng: Rng) -> str:
    """Addition and subtraction of small numbers."""
    lines = []
    for _ in range(rng.randint(1, 5)):
        one, other = rng.randint(0, 10), rng.randint(0, 10)
        if rng.random() < 0.3:
            one, other = max(one, other), min(one, other)
            lines.append((f"{one} - {other}", f"{NUMBERS[one]} minus {NUMBERS[other]}", one - other))
        else:
            lines.append((f"{one} + {other}", f"{NUMBERS[one]} plus {NUMBERS[other]}", one + other))
    form = rng.randrange(3)
    if form == 0:
        return "\n".join(f"{digits} = {total}" for digits, _, total in lines)
    if form == 1:
        return " ".join(f"{words.capitalize()} is {NUMBERS[total]}." for _, words, total in lines)
    return "<eos>".join(f"<user>What is {digits}?<assistant>{total}" for digits, _, total in lines)


def common(rng: Rng) -> str:
    """What everybody in the world knows: kinds, opposites, colours, sounds, homes, days, months, singular and plural."""
    facts: list[tuple[str, str, str]] = []
    for _ in range(rng.randint(1, 4)):
        group, kind = rng.choice(
            (
                (FRUITS, "fruit"),
                (VEGETABLES, "vegetable"),
                (ANIMALS, "animal"),
                (COLOURS, "colour"),
                (DRINKS, "drink"),
                (JOBS, "job"),
            )
        )
        word, noun = rng.choice(group), rng.choice(OBJECTS + FOODS + ANIMALS)
        one, other = rng.choice(OPPOSITES).split()
        what, colour = rng.choice(list(COLOUR_OF.items()))
        animal, sound = rng.choice(list(SOUNDS.items()))
        who, home = rng.choice(list(HOMES.items()))
        circle = rng.choice((DAYS, MONTHS))
        i = rng.randrange(len(circle))
        facts.append(
            rng.choice(
                (
                    (f"What is {word}?", kind.capitalize() + ".", f"{word.capitalize()} is {article(kind)}."),
                    (f"What is the opposite of {one}?", other, f"The opposite of {one} is {other}."),
                    (f"What colour is {what}?", colour.capitalize() + ".", f"{what.capitalize()} is {colour}."),
                    (
                        f"What does {article(animal)} say?",
                        sound.capitalize() + "!",
                        f"{article(animal).capitalize()} says {sound}.",
                    ),
                    (
                        f"Where does {article(who)} live?",
                        f"In {article(home)}.",
                        f"{article(who).capitalize()} lives in {article(home)}.",
                    ),
                    (f"What comes after {circle[i - 1]}?", circle[i], f"After {circle[i - 1]} comes {circle[i]}."),
                    (f"One {noun}, two what?", plural(noun), f"One {noun}, two {plural(noun)}."),
                    (
                        f"What is one of the {plural(noun)}?",
                        article(noun),
                        f"One of the {plural(noun)} is {article(noun)}.",
                    ),
                )
            )
        )
    form = rng.randrange(3)
    if form == 0:
        return " ".join(statement for _, _, statement in facts)
    if form == 1:
        return "\n".join(f"Question: {question}\nAnswer: {answer}" for question, answer, _ in facts)
    return "<eos>".join(f"<user>{question}<assistant>{answer}" for question, answer, _ in facts)


def shelf(rng: Rng) -> str:
    """Lists: things of one kind, things to buy, days, months, the alphabet."""
    form = rng.randrange(5)
    if form == 0:
        group, kind = rng.choice(
            (
                (FRUITS, "Fruits"),
                (VEGETABLES, "Vegetables"),
                (ANIMALS, "Animals"),
                (COLOURS, "Colours"),
                (DRINKS, "Drinks"),
                (JOBS, "Jobs"),
                (GIRLS, "Girls"),
                (BOYS, "Boys"),
                (TOWNS, "Towns"),
            )
        )
        return f"{kind}: " + ", ".join(rng.sample(group, rng.randint(3, min(6, len(group))))) + "."
    if form == 1:
        circle, what = rng.choice(
            (
                (DAYS, "The days of the week are "),
                (MONTHS, "The months of the year are "),
                (list(string.ascii_lowercase), "The letters are "),
            )
        )
        return what + listed(circle) + "."
    if form == 2:
        items = [
            f"{NUMBERS[rng.randint(2, 12)]} {plural(rng.choice(FOODS + OBJECTS))}" for _ in range(rng.randint(2, 6))
        ]
        return rng.choice(("To buy", "Shopping list", "In the bag")) + ":\n" + "\n".join(f"- {item}" for item in items)
    if form == 3:
        names = rng.sample(NAMES, rng.randint(2, 6))
        place = rng.choice(("garden", "school", "kitchen", "park", "boat"))
        return f"{listed(names)} are in the {place}. Who is in the {place}? {listed(names)}."
    items = [f"{rng.choice(COLOURS)} {rng.choice(OBJECTS)}" for _ in range(rng.randint(2, 6))]
    return f"On the shelf there is {listed([article(item) for item in items])}. The list: {', '.join(items)}."


FAMILIES: tuple[tuple[Callable[[Rng], str], float], ...] = (
    (story, 0.11), (dialogue, 0.08), (profile, 0.15), (order, 0.13), (secret, 0.10), (repeat, 0.12), (lookup, 0.09), (pick, 0.05), (spelling, 0.03),
    (counting, 0.04), (sums, 0.03), (common, 0.04), (shelf, 0.03),
)  # fmt: skip


def documents(seed: int) -> Iterator[str]:
    """Documents without end; the same seed gives the same documents."""
    rng = Rng(f"weft-world-{seed}")
    families, weights = zip(*FAMILIES, strict=True)
    while True:
        yield rng.choices(families, weights)[0](rng)
