"""Passages with questions whose answers stand in the passage: persons, orders and secrets."""

from __future__ import annotations

import random
import string

from words import (
    BOYS,
    COLOURS,
    DAYS,
    FOODS,
    GIRLS,
    INSTRUMENTS,
    JOBS,
    MONTHS,
    NUMBERS,
    OBJECTS,
    PETS,
    PLAIN,
    SPORTS,
    SYLLABLES,
    TOWNS,
    article,
    listed,
    plural,
)  # fmt: skip

Rng = random.Random


def person(rng: Rng) -> tuple[str, str, str]:
    """Name, ``he`` or ``she``, ``his`` or ``her``; one name in six is invented."""
    girl = rng.random() < 0.5
    name = rng.choice(GIRLS if girl else BOYS)
    if rng.random() < 0.16:
        name = "".join(rng.choice(SYLLABLES) for _ in range(rng.randint(2, 3))).capitalize()
    return (name, "she", "her") if girl else (name, "he", "his")


def asked(rng: Rng, text: str, questions: list[tuple[str, str, str]]) -> str:
    """The passage with some questions, each (question, short answer, whole sentence), in one of the forms of the world."""
    some = rng.sample(questions, min(len(questions), rng.randint(1, 4)))
    short = rng.random() < 0.7
    pairs = [(question, answer if short else sentence) for question, answer, sentence in some]
    form = rng.randrange(5)
    if form == 0:
        return text + "\n" + "\n".join(f"Question: {q}\nAnswer: {a}" for q, a in pairs)
    if form == 1:
        return text + "\n" + "\n".join(f"Q: {q}\nA: {a}" for q, a in pairs)
    if form == 2:
        return text + "\n\n" + "\n\n".join(f"{q}\n{a}" for q, a in pairs)
    first, rest = pairs[0], pairs[1:]
    system = (
        "<system>" + rng.choice(("You are a helpful assistant.", "Answer the question.", "Be kind and short."))
        if rng.random() < 0.15
        else ""
    )
    turns = [
        f"<user>{text}{rng.choice((' ', chr(10)))}{first[0]}<assistant>{first[1]}",
        *(f"<user>{q}<assistant>{a}" for q, a in rest),
    ]
    return system + "<eos>".join(turns)


def facts(rng: Rng) -> tuple[str, str, list[tuple[str, str, str]]]:
    """One person: name, a passage, and questions (question, short answer, sentence)."""
    name, he, his = person(rng)
    He, His = he.capitalize(), his.capitalize()
    pet, town, colour, job, age = (
        rng.choice(PETS),
        rng.choice(TOWNS),
        rng.choice(COLOURS),
        rng.choice(JOBS),
        rng.randint(5, 90),
    )
    pet_name, friend, food = person(rng)[0], person(rng)[0], rng.choice(FOODS)
    month, play, sport, likes = rng.choice(MONTHS), rng.choice(INSTRUMENTS), rng.choice(SPORTS), rng.choice(COLOURS)
    known = [
        (
            [f"{name} lives in {town}.", f"{His} home is in {town}.", f"{name} comes from {town}."],
            f"Where does {name} live?",
            town,
            f"{name} lives in {town}.",
        ),
        (
            [f"{name} is {article(job)}.", f"{He} works as {article(job)}."],
            f"What is the job of {name}?",
            job,
            f"{name} is {article(job)}.",
        ),
        (
            [f"{name} is {age} years old.", f"{He} is {age} years old."],
            f"How old is {name}?",
            str(age),
            f"{name} is {age} years old.",
        ),
        (
            [
                f"{He} has {article(pet)} called {pet_name}.",
                f"{name} has {article(pet)}. The {pet} is called {pet_name}.",
            ],
            f"What is the {pet} of {name} called?",
            pet_name,
            f"The {pet} is called {pet_name}.",
        ),
        (
            [f"{His} favourite colour is {colour}.", f"{name} likes the colour {colour}."],
            f"What is the favourite colour of {name}?",
            colour,
            f"{His} favourite colour is {colour}.",
        ),
        (
            [f"{His} best friend is {friend}.", f"{name} has a friend called {friend}."],
            f"Who is the friend of {name}?",
            friend,
            f"The friend of {name} is {friend}.",
        ),
        (
            [f"{He} likes to eat {plural(food)}.", f"{name} likes {plural(food)}."],
            f"What does {name} like to eat?",
            plural(food),
            f"{name} likes to eat {plural(food)}.",
        ),
        (
            [f"{His} birthday is in {month}.", f"{name} was born in {month}."],
            f"When is the birthday of {name}?",
            month,
            f"{His} birthday is in {month}.",
        ),
        (
            [f"{He} plays the {play}.", f"{name} can play the {play}."],
            f"What does {name} play?",
            play,
            f"{name} plays the {play}.",
        ),
        (
            [f"{His} hobby is {sport}.", f"In the evening {he} likes {sport}."],
            f"What is the hobby of {name}?",
            sport,
            f"{His} hobby is {sport}.",
        ),
        (
            [f"The house of {name} is {likes}.", f"{He} lives in {article(likes)} house."],
            f"What colour is the house of {name}?",
            likes,
            f"The house of {name} is {likes}.",
        ),
    ]
    chosen = rng.sample(known, rng.randint(2, 6))
    said = [rng.choice(forms) for forms, *_ in chosen]
    if not said[0].startswith(name):
        said[0] = next((form for form in chosen[0][0] if form.startswith(name)), f"This is {name}. {said[0]}")
    questions = [(question, answer, sentence) for _, question, answer, sentence in chosen]
    return name, " ".join(said), questions


def profile(rng: Rng) -> str:
    """One to three persons, and questions about them."""
    people = {}
    for _ in range(rng.choice((1, 1, 2, 2, 3))):
        name, text, questions = facts(rng)
        people.setdefault(name, (text, questions))
    text = rng.choice((" ", "\n")).join(text for text, _ in people.values())
    return asked(rng, text, [question for _, questions in people.values() for question in questions])


def order(rng: Rng) -> str:
    """Who wants, buys, has or sees how many of what in which colour; and questions."""
    texts, questions = [], []
    nouns = rng.sample(OBJECTS + FOODS, 6)
    names: set[str] = set()
    for _ in range(rng.choice((1, 1, 1, 2))):
        name, _, _ = person(rng)
        if name in names:
            continue
        names.add(name)
        does, do = rng.choice(
            (
                ("wants", "want"),
                ("buys", "buy"),
                ("has", "have"),
                ("sees", "see"),
                ("orders", "order"),
                ("needs", "need"),
            )
        )
        day, town, parts = rng.choice(DAYS), rng.choice(TOWNS), []
        for _ in range(rng.randint(1, 3)):
            noun, count, colour = nouns.pop(), rng.randint(1, 12), rng.choice(COLOURS)
            things = noun if count == 1 else plural(noun)
            amount = str(count) if rng.random() < 0.25 else NUMBERS[count]
            parts.append(f"{amount} {colour} {things}")
            verb = "is" if count == 1 else "are"
            questions += [
                (
                    f"How many {plural(noun)} does {name} {do}?",
                    rng.choice((NUMBERS[count], str(count))),
                    f"{name} {does} {amount} {things}.",
                ),
                (f"What colour {verb} the {things}?", colour, f"The {things} {verb} {colour}."),
                (f"Who {does} the {things}?", name, f"{name} {does} the {things}."),
            ]
        when, where = rng.random() < 0.5, rng.random() < 0.5
        texts.append(f"{f'On {day} ' if when else ''}{name} {does} {listed(parts)}{f' in {town}' if where else ''}.")
        questions.append((f"What does {name} {do}?", listed(parts), f"{name} {does} {listed(parts)}."))
        if when:
            questions.append((f"On which day does {name} {do} it?", day, f"{name} {does} it on {day}."))
        if where:
            questions.append((f"Where does {name} {do} it?", town, f"{name} {does} it in {town}."))
        if rng.random() < 0.3:
            texts[-1] = (
                rng.choice((f"Hello, this is {name}. ", f"My name is {name}. ", f"Dear shop, I am {name}. "))
                + f"{rng.choice(('I want', 'I need', 'Please send', 'Please bring'))} {listed(parts)}"
                + (f" on {day}." if when else ".")
                + (f" I live in {town}." if where else "")
            )
    return asked(rng, " ".join(texts), questions)


def secret(rng: Rng) -> str:
    """Private facts, told by the user or about somebody, and asked for afterwards."""
    name = person(rng)[0]
    digits = "".join(rng.choice(string.digits) for _ in range(rng.randint(3, 6)))
    code = "".join(rng.choice(string.ascii_uppercase) for _ in range(2)) + digits[:3]
    word = rng.choice(PLAIN) if rng.random() < 0.7 else "".join(rng.choice(SYLLABLES) for _ in range(3))
    place = rng.choice(("box", "garden", "kitchen", "tower", "forest", "cave", "school"))
    known = {
        "secret word": word, "password": rng.choice((word, code, rng.choice(PLAIN) + digits[:2])), "door code": rng.choice((digits, code)), "lucky number": str(rng.randint(1, 99)),
        "favourite colour": rng.choice(COLOURS), "favourite food": plural(rng.choice(FOODS)), "town": rng.choice(TOWNS), "name": name, "phone number": digits,
        "best friend": person(rng)[0], "hiding place": f"the {place}", "favourite day": rng.choice(DAYS), "favourite animal": rng.choice(PETS), "favourite object": rng.choice(OBJECTS),
    }  # fmt: skip
    some = rng.sample(list(known), rng.randint(1, 4))
    ask = rng.choice(some)
    answer = known[ask]
    whole = rng.random() < 0.4
    if rng.random() < 0.65:
        told = " ".join(f"My {key} is {known[key]}." for key in some)
        reply = f"Your {ask} is {answer}." if whole else answer
        form = rng.randrange(3)
        if form == 0:
            heard = rng.choice(("I will remember it.", "Thank you.", "I keep it safe.", "Good."))
            return f"<user>{told}<assistant>{heard}<eos><user>What is my {ask}?<assistant>{reply}"
        if form == 1:
            return f"<user>{told} What is my {ask}?<assistant>{reply}"
        return f"{told}\nQuestion: What is my {ask}?\nAnswer: {reply}"
    told = " ".join(f"The {key} of {name} is {known[key]}." for key in some)
    reply = f"The {ask} of {name} is {answer}." if whole else answer
    if rng.random() < 0.5:
        return f"<user>{told} What is the {ask} of {name}?<assistant>{reply}"
    return f"{told}\nQuestion: What is the {ask} of {name}?\nAnswer: {reply}"
