"""Short stories and dialogues from a grammar. The hero, the friend and the thing stay the same through a story."""

from __future__ import annotations

import random

from passages import person
from words import (
    ANIMALS,
    COLOURS,
    DAYS,
    DRINKS,
    FOODS,
    MOODS,
    OBJECTS,
    OPPOSITES,
    PLACES,
    SIZES,
    SPORTS,
    TOWNS,
    WEATHER,
    article,
    plural,
)

Rng = random.Random


def story(rng: Rng) -> str:
    """Who, where, a few events, an end: six to ten sentences."""
    (name, he, his), (friend, friend_he, _) = person(rng), person(rng)
    him = "her" if he == "she" else "him"
    He, friend_He = he.capitalize(), friend_he.capitalize()
    animal, size, mood, weather = rng.choice(ANIMALS), rng.choice(SIZES), rng.choice(MOODS), rng.choice(WEATHER)
    place, other_place = rng.sample(PLACES, 2)
    thing, food = f"{rng.choice(COLOURS)} {rng.choice(OBJECTS)}", rng.choice(FOODS)
    child = rng.choice(("girl" if he == "she" else "boy", animal))
    opening = rng.choice(
        (
            f"Once upon a time there was {article(size)} {child} named {name}. {name} lived in {rng.choice(TOWNS)}.",
            f"Once upon a time there was {article(size)} {child} called {name}. {He} lived near the {place}.",
            f"One {weather} {rng.choice(DAYS)}, {name} went to the {place}.",
            f"{name} was {article(mood)} {child}. Every day {he} went to the {place}.",
            f"It was {article(weather)} day. {name} the {child} was in the {place}.",
        )
    )
    wish = rng.choice(
        (
            f"{He} wanted to find {article(thing)}.",
            f"{He} had {article(thing)}.",
            f"{He} liked {his} {thing} very much.",
            f"There {he} saw {article(thing)}.",
        )
    )
    trouble = rng.choice(
        (
            f"One day the {thing} was gone. {name} was very sad.",
            f'But the {thing} fell into the river. "Oh no!" said {name}.',
            f"But the {thing} was too heavy for {him}.",
            f"Then the wind took the {thing} away. {name} began to cry.",
            f"{name} looked for the {thing} in the {other_place}, but it was not there.",
            f"Then {name} heard a noise. It was {article(animal)}.",
        )
    )
    meeting = rng.choice(
        (
            f'Then {he} met {friend}. "Why are you so sad?" asked {friend}. "I can not find my {thing}," said {name}.',
            f'{friend} came to help. "Do not worry," said {friend}. "We will look for the {thing}."',
            f'"Can you help me?" asked {name}. "Yes, I can help you," said {friend}.',
            f"{name} asked {his} friend {friend} for help. {friend} said yes.",
        )
    )
    solution = rng.choice(
        (
            f"They looked in the {other_place}. There was the {thing}, under a big tree.",
            f"They walked to the {other_place} and found the {thing} there.",
            f"{friend} had an idea. {friend_He} took a long rope and got the {thing} back.",
            f"{friend} gave {name} {article(food)}, and they sat down and ate. Then they found the {thing}.",
            f"In the {other_place} they saw {article(animal)}. The {animal} had the {thing}.",
        )
    )
    end = rng.choice(
        (
            f'{name} was happy. "Thank you, {friend}!" {he} said.',
            f"{name} and {friend} played with the {thing} until the evening.",
            f"From that day on, {name} and {friend} were best friends.",
            f"{name} gave {friend} {article(food)} and they went home.",
            f"Then {name} went home and told {his} mother about the {thing}. The end.",
        )
    )
    parts = [opening, wish, trouble, meeting, solution, end]
    if rng.random() < 0.3:
        del parts[rng.choice((2, 3))]
    text = " ".join(parts)
    kind = rng.random()
    if kind < 0.12:
        return f"<user>Tell me a story about {name}.<assistant>{text}"
    if kind < 0.24:
        return f"{text}\n" + rng.choice(
            (
                f"Question: Who was the friend of {name}?\nAnswer: {friend}"
                if friend in text
                else f"Question: Who is the story about?\nAnswer: {name}",
                f"Question: What is the story about?\nAnswer: {article(thing).capitalize()}.",
            )
        )
    return text


def dialogue(rng: Rng) -> str:
    """Two persons talk, or a user talks with an assistant."""
    (name, _, _), (friend, _, _) = person(rng), person(rng)
    food, drink, thing, place, day, mood, town = (
        rng.choice(FOODS),
        rng.choice(DRINKS),
        rng.choice(OBJECTS),
        rng.choice(PLACES),
        rng.choice(DAYS),
        rng.choice(MOODS),
        rng.choice(TOWNS),
    )
    colour, sport, pair = rng.choice(COLOURS), rng.choice(SPORTS), rng.choice(OPPOSITES).split()
    turns = [
        (
            f"Do you want {article(food)}?",
            rng.choice(("Yes, please.", f"No, thank you. I do not like {plural(food)}.")),
        ),
        (
            f"Where is my {thing}?",
            rng.choice((f"Your {thing} is in the {place}.", f"I do not know where your {thing} is.")),
        ),
        (
            f"Can we go to the {place} on {day}?",
            rng.choice((f"Yes, we can go to the {place} on {day}.", f"No, on {day} I have no time.")),
        ),
        (f"I am so {mood} today.", rng.choice((f"Why are you {mood}?", f"I am {mood} too."))),
        (
            f"Is your {thing} {colour}?",
            rng.choice((f"Yes, my {thing} is {colour}.", f"No, my {thing} is {rng.choice(COLOURS)}.")),
        ),
        (f"I would like some {drink}, please.", f"Here is your {drink}."),
        (f"Do you like {sport}?", rng.choice((f"Yes, I like {sport} very much.", f"No, I do not like {sport}."))),
        (f"I come from {town}.", rng.choice((f"Is {town} a nice town?", f"My friend lives in {town}."))),
        (f"Is the {thing} {pair[0]}?", f"No, it is not {pair[0]}. It is {pair[1]}."),
        ("Thank you.", "You are welcome."),
    ]
    some = rng.sample(turns[:-1], rng.randint(1, 3)) + turns[-1:] * (rng.random() < 0.3)
    form = rng.randrange(4)
    if form == 0:
        hello = rng.choice((f"Hello, my name is {name}.", f"Hi! I am {name}."))
        return "<eos>".join(
            f"<user>{one}<assistant>{other}"
            for one, other in [
                (hello, f"Hello, {name}!"),
                *some,
                *([("What is my name?", f"Your name is {name}.")] * (rng.random() < 0.7)),
            ]
        )
    if form == 1:
        return "<eos>".join(f"<user>{one}<assistant>{other}" for one, other in some)
    if form == 2:
        return "\n".join(f"{name}: {one}\n{friend}: {other}" for one, other in some)
    return " ".join(f'"{one}" said {name}. "{other}" said {friend}.' for one, other in some)
