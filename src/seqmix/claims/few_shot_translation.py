"""Few-shot translation: five good demonstrations make a language model translate in their style (2023)."""

from __future__ import annotations

import random
import statistics
from collections import defaultdict
from functools import partial
from typing import Any

from seqmix.claims._claim import Claim, Finding, Run, compare_groups
from seqmix.claims._finetuning import pretrained
from seqmix.data.translations import chrf, read_messages

LANGUAGES = {"en": "English", "fr": "French", "pt": "Portuguese", "pt_BR": "Portuguese"}
SHORTEST, LONGEST = 4, 14  # words of an English message
ALIKE = 80.0  # chrF above which two translations have one style
GOOD, MISALIGNED, SHUFFLED = "good", "of other messages", "words in random order"
VARIETIES = ("pt", "pt_BR")

Pairs = list[tuple[str, str]]


def measure(run: Run) -> list[Finding]:
    made: dict[str, list[float]] = {}
    for count in run["shots"]:
        made[f"{count} {GOOD}"] = run.remember(f"{count} {GOOD}", partial(scores, run, GOOD, count))
    most = max(run["shots"])
    for quality in (MISALIGNED, SHUFFLED):
        made[quality] = run.remember(quality, partial(scores, run, quality, most))
    styles = {
        name: run.remember(f"demonstrations in {name}", partial(preferences, run, name))
        for name in VARIETIES
    }
    return [more_is_better(run, made), quality_matters(run, made), style_follows(styles)]


# ---- data and prompts


def messages(run: Run, language: str) -> dict[str, str]:
    """English messages of a few words and their translations, which are others."""
    if run["data"] is None:
        known = {f"Send the file {n} now": QUICK[language].format(n) for n in range(8)}
    else:
        known = read_messages(language)
    return {
        message: translation
        for message, translation in known.items()
        if SHORTEST <= len(message.split()) <= LONGEST and message != translation
    }


def divided(run: Run, pairs: Pairs, tokenizer: Any) -> tuple[list[Pairs], list[Pairs]]:
    """Sets of demonstrations, and as many sets of tests; the tests have few lengths, so that they fill batches."""
    draw = random.Random(run["seed"])
    pairs = draw.sample(pairs, len(pairs))
    sets, most = run["sets"], max(run["shots"])
    shown, rest = pairs[: sets * most], pairs[sets * most :]
    by_length: dict[int, Pairs] = defaultdict(list)
    for pair in rest:
        by_length[len(tokenizer(pair[0]).input_ids)].append(pair)
    tests = [
        pair
        for alike in sorted(by_length.values(), key=len)[-run["lengths"] :]
        for pair in alike[: sets * run["tests of a length"]]
    ]
    return [shown[i::sets] for i in range(sets)], [tests[i::sets] for i in range(sets)]


def demonstrations(pairs: Pairs, quality: str, draw: random.Random) -> Pairs:
    if quality == MISALIGNED:
        return [(pairs[place - 1][0], pairs[place][1]) for place in range(len(pairs))]
    if quality == SHUFFLED:
        return [(text, " ".join(draw.sample(t.split(), len(t.split())))) for text, t in pairs]
    return pairs


def translated(
    run: Run, model: Any, tokenizer: Any, shown: Pairs, texts: list[str], languages: tuple[str, str]
) -> list[str]:
    from seqmix.generate.few_shot import FewShot, answer_texts

    source, target = (f"{LANGUAGES[language]}:" for language in languages)
    prompt = FewShot(shown, source=source, target=target)
    return answer_texts(model, tokenizer, prompt, texts, new_tokens=run["new tokens"])


# ---- what is compared


def scores(run: Run, quality: str, count: int) -> list[float]:
    """chrF of translations from French into English, by sentence."""
    model, tokenizer = subject(run)
    pairs = [(french, english) for english, french in messages(run, "fr").items()]
    found = []
    for shown, tests in zip(*divided(run, pairs, tokenizer), strict=True):
        made = demonstrations(shown, quality, random.Random(run["seed"]))[:count]
        texts, wanted = zip(*tests, strict=True)
        answers = translated(run, model, tokenizer, made, list(texts), ("fr", "en"))
        found += [chrf([a], [b]) for a, b in zip(answers, wanted, strict=True)]
    return found


def preferences(run: Run, variety: str) -> dict[str, list[float]]:
    """chrF of translations into Portuguese to the translations of both varieties, with demonstrations in one."""
    model, tokenizer = subject(run)
    european, brazilian = (messages(run, name) for name in VARIETIES)
    differ = [
        english
        for english in european
        if english in brazilian and chrf([european[english]], [brazilian[english]]) < ALIKE
    ]
    known = {"pt": european, "pt_BR": brazilian}
    pairs = [(english, english) for english in differ]
    found: dict[str, list[float]] = {name: [] for name in VARIETIES}
    for shown, tests in zip(*divided(run, pairs, tokenizer), strict=True):
        made = [(english, known[variety][english]) for english, _ in shown]
        texts = [english for english, _ in tests]
        answers = translated(run, model, tokenizer, made, texts, ("en", variety))
        for name in VARIETIES:
            wanted = [known[name][english] for english in texts]
            found[name] += [chrf([a], [b]) for a, b in zip(answers, wanted, strict=True)]
    return found


_loaded: dict[Any, Any] = {}


def subject(run: Run) -> Any:
    """The model and its tokeniser, loaded once, for that takes half a minute."""
    if run["model"] not in _loaded:
        _loaded[run["model"]] = pretrained(run)
    return _loaded[run["model"]]


# ---- the statements


def gain(better: list[float], worse: list[float]) -> Any:
    return compare_groups([a - b for a, b in zip(better, worse, strict=True)], [0.0])


def means(made: dict[str, list[float]]) -> dict[str, Any]:
    return {"sentences": len(next(iter(made.values())))} | {
        name: statistics.fmean(each) for name, each in made.items()
    }


def more_is_better(run: Run, made: dict[str, list[float]]) -> Finding:
    least, most = (f"{each(run['shots'])} {GOOD}" for each in (min, max))
    return Finding(
        "A few demonstrations make the model translate better.",
        f"chrF with {most} demonstrations above that with {least}, by two standard errors of the difference over "
        "sentences",
        means(made),
        gain(made[most], made[least]),
    )


def quality_matters(run: Run, made: dict[str, list[float]]) -> Finding:
    most = f"{max(run['shots'])} {GOOD}"
    verdicts = {gain(made[most], made[quality]) for quality in (MISALIGNED, SHUFFLED)}
    return Finding(
        "The quality of the demonstrations determines the quality of the translations.",
        "chrF with good demonstrations above that with as many translations of other messages, and above that with "
        "translations whose words are shuffled, both by two standard errors of the difference over sentences",
        means(made),
        verdicts.pop() if len(verdicts) == 1 else "inconclusive",
    )


def style_follows(styles: dict[str, dict[str, list[float]]]) -> Finding:
    european, brazilian = VARIETIES
    leans = {
        name: [a - b for a, b in zip(found[european], found[brazilian], strict=True)]
        for name, found in styles.items()
    }
    return Finding(
        "Translations follow the demonstrations in style: here, the Portuguese of Portugal or of Brazil.",
        "chrF to the translation of Portugal less that to the one of Brazil: higher with demonstrations of Portugal "
        "than of Brazil, by two standard errors of the difference over sentences",
        {
            f"demonstrations in {name}": {
                f"chrF to {each}": statistics.fmean(found[each]) for each in VARIETIES
            }
            for name, found in styles.items()
        }
        | {"sentences": len(leans[european])},
        gain(leans[european], leans[brazilian]),
    )


QUICK = {"fr": "Envoyez le {}", "pt": "Envie o ficheiro {}", "pt_BR": "Mande logo arquivos {}"}

CLAIM = Claim(
    title="The unreasonable effectiveness of few-shot learning for machine translation",
    paper="arXiv:2302.01398",
    claimed="A decoder trained on unpaired text translates well after five demonstrations in its prompt; their quality "
    "determines that of the translations, and their style, such as the variety of the language, is followed. Here: "
    "a multilingual model of 270 M parameters in 4 bits and short messages of software, where the paper trains models "
    "of 8 B on two or three languages and takes news. What the model was trained on is not known; pairs may be in it.",
    where="abstract; section 4 (number and quality of demonstrations); section 5 (regional varieties, formality)",
    measure=measure,
    quick={
        "model": None,
        "data": None,
        "seed": 0,
        "shots": [0, 1, 2],
        "sets": 1,
        "lengths": 1,
        "tests of a length": 2,
        "new tokens": 3,
    },
    full={
        "model": "gemma3-270m",
        "data": "django",
        "seed": 0,
        "shots": [0, 1, 5],
        "sets": 2,
        "lengths": 3,
        "tests of a length": 8,
        "new tokens": 24,
    },
)
