"""The task of the demo: a shop's message in plain English becomes one JSON record.

    Hello, this is Maya from Norwick. Please send 3 red cups and 1 blue plate by Friday.
    {"name":"Maya","town":"Norwick","day":"Friday","items":["3 red cups","1 blue plate"]}

The embedded base knows the words and can read the message, but has never seen a record. The held-out split asks for more than
memory: its names, and the colour and thing that stand together in each order's first item, never occur in the training split.
This module knows no model and no tokenizer, and imports only the standard library and weft's errors.
"""

from __future__ import annotations

import json
import random

from weft.errors import DataError, did_you_mean

__all__ = ["SPLITS", "examples"]

SPLITS = ("train", "heldout")
HELDOUT_NAMES = ("Maya", "Oscar", "Helen", "Ravi", "Lucy", "Victor", "Amina", "Noah")
TRAIN_NAMES = (
    "Ada Alice Anna Bella Clara Dana Emma Eva Fatima Grace Hana Ida Iris Julia Kate Lena Lily Mia Nora Olga Paula Rosa Ruby Sara Sofia"
    " Tara Vera Yara Zoe Adam Ali Ben Carl Chen David Diego Emil Felix George Henry Hugo Ivan Jack John Kenji Kofi Leo Liam Luca Mark"
    " Max Nick Omar Otto Paul Peter Sam Sven Theo Tom Walter Yusuf"
).split()
TOWNS = "Ashford Birchwood Eastport Foxhill Greenfield Lakeview Millbrook Newhaven Norwick Oakridge Redhill Riverton Sandport Sunfield".split()
DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
COLOURS = "red blue green yellow black white brown pink orange purple grey silver".split()
THINGS = "cup plate bowl spoon lamp chair table bag ball book pen pencil hat coat shirt towel candle bottle basket clock kite drum".split()
MESSAGES = (
    "Hello, this is {name} from {town}. Please send {items} by {day}.",
    "My name is {name}. I need {items} on {day}. I live in {town}.",
    "{name} in {town} wants {items} on {day}.",
    "On {day} {name} needs {items} in {town}.",
    "Please bring {items} to {town} on {day}. Thank you, {name}.",
    "I would like {items}, please. I am {name} and I live in {town}. Can it be on {day}?",
)

Item = tuple[int, str, str]


def examples(split: str, count: int, seed: int = 0) -> list[dict[str, str]]:
    """Examples of the task; the same arguments give the same examples.

    Args:
        split: ``"train"`` or ``"heldout"``. No name and no first item (colour and thing) of one is in the other.
        count: how many; all prompts are different.
        seed: another seed gives other examples of the same split.

    Returns:
        ``[{"prompt": message, "completion": record}, …]``; a message ends with a line break, a record is JSON without one.

    Raises:
        DataError: an unknown split or a negative count.
    """
    if split not in SPLITS:
        raise DataError(
            f"the demo task has no split {split!r}, only {', '.join(map(repr, SPLITS))}.{did_you_mean(split, SPLITS)}"
        )
    if count < 0:
        raise DataError(f"the demo task can't give {count} examples; ask for 0 or more")
    rng = random.Random(f"weft-demo-{split}-{seed}")
    found: dict[str, str] = {}
    while len(found) < count:
        prompt, completion = _example(rng, split)
        found.setdefault(prompt, completion)
    return [{"prompt": prompt, "completion": completion} for prompt, completion in found.items()]


def _kept_for_heldout(colour: str, thing: str) -> bool:
    """Whether this colour of this thing is kept away from the training split: one pair in six."""
    return (COLOURS.index(colour) + THINGS.index(thing)) % 6 == 0


def _example(rng: random.Random, split: str) -> tuple[str, str]:
    """One prompt and its completion."""
    heldout = split == "heldout"
    name = rng.choice(HELDOUT_NAMES if heldout else TRAIN_NAMES)
    town, day, items = rng.choice(TOWNS), rng.choice(DAYS), _items(rng, heldout)
    phrases = [f"{count} {colour} {thing}{'s' if count > 1 else ''}" for count, colour, thing in items]
    spoken = phrases[0] if len(phrases) == 1 else ", ".join(phrases[:-1]) + " and " + phrases[-1]
    record = {"name": name, "town": town, "day": day, "items": phrases}
    prompt = rng.choice(MESSAGES).format(name=name, town=town, day=day, items=spoken) + "\n"
    return prompt, json.dumps(record, separators=(",", ":"))


def _items(rng: random.Random, heldout: bool) -> list[Item]:
    """One to three items of different things and numbers; the first one's pair belongs to the split, no other is kept away."""
    size = rng.choice((1, 2, 2, 3))
    items = []
    for place, (count, thing) in enumerate(zip(rng.sample(range(1, 10), size), rng.sample(THINGS, size), strict=True)):
        free = [colour for colour in COLOURS if not _kept_for_heldout(colour, thing)]
        kept = [colour for colour in COLOURS if _kept_for_heldout(colour, thing)]
        items.append((count, rng.choice(kept if heldout and place == 0 else free), thing))
    return items
