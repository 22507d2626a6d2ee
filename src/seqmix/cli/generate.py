"""Generate text."""

from __future__ import annotations

import dataclasses
import json as json_format
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from seqmix.cli._terminal import MODEL, Json, Seed, print_json, print_text, say, work
from seqmix.core.errors import ConfigError, DataError

if TYPE_CHECKING:
    from seqmix.generate._method import Method
    from seqmix.generate.constrained import Language
    from seqmix.generate.speculative import Drafter
    from seqmix.generate.speculative_tree import TreeDrafter


def run(
    model: Annotated[str, typer.Argument(help=MODEL, show_default=False)],
    prompt: Annotated[str, typer.Option(help="The text to continue.")],
    new_tokens: Annotated[int, typer.Option(help="At most so many new tokens.")] = 64,
    temperature: Annotated[
        float | None,
        typer.Option(help="Sample at this temperature; without it, the likeliest token."),
    ] = None,
    top_k: Annotated[int | None, typer.Option(help="Sample among so many tokens.")] = None,
    top_p: Annotated[
        float | None, typer.Option(help="Sample among this share of probability.")
    ] = None,
    min_p: Annotated[
        float | None, typer.Option(help="Sample from this share of the likeliest's probability.")
    ] = None,
    repetition_penalty: Annotated[
        float, typer.Option(help="Above 1: tokens that were there before become less likely.")
    ] = 1.0,
    presence_penalty: Annotated[
        float, typer.Option(help="Taken off the logits of tokens that are in the new text.")
    ] = 0.0,
    frequency_penalty: Annotated[
        float, typer.Option(help="The same, for every time that they are in it.")
    ] = 0.0,
    beams: Annotated[int, typer.Option(help="Beams of a beam search, or of each group.")] = 1,
    groups: Annotated[
        int, typer.Option(help="Groups of beams that avoid each other (diverse beam search).")
    ] = 1,
    diversity: Annotated[float, typer.Option(help="How much the groups do.")] = 0.5,
    contrastive: Annotated[
        float | None, typer.Option(help="Contrastive search with this weight, in [0, 1].")
    ] = None,
    draft: Annotated[
        str | None,
        typer.Option(help="Let this model guess ahead: a faster one with the same tokenizer."),
    ] = None,
    lookup: Annotated[
        bool, typer.Option("--lookup", help="Guess ahead by what followed the same words before.")
    ] = False,
    guesses: Annotated[int, typer.Option(help="Tokens that are guessed at a time.")] = 4,
    branches: Annotated[
        int, typer.Option(help="Guess a tree, with so many nodes at each depth.")
    ] = 1,
    stop: Annotated[
        list[str] | None, typer.Option(help="End before this string; may be given again.")
    ] = None,
    pattern: Annotated[
        str | None, typer.Option(help="Write a text that matches this regular expression.")
    ] = None,
    json_schema: Annotated[
        Path | None, typer.Option(help="Write JSON that is valid under the schema in this file.")
    ] = None,
    choice: Annotated[
        list[str] | None, typer.Option(help="Write one of these texts; give each by itself.")
    ] = None,
    texts: Annotated[int, typer.Option(help="So many samples or beams, one after another.")] = 1,
    seed: Seed = 0,
    json: Json = False,
) -> None:
    """Continue a prompt; the text appears as it is written.

    Example: `seqmix generate runs/hybrid --prompt "To be" --temperature 0.8`

    Example: `seqmix generate runs/hybrid --prompt "To be" --groups 3 --beams 2 --texts 3`

    Example: `seqmix generate runs/hybrid --prompt "To be" --draft runs/small`

    Example: `seqmix generate smollm2-135m --prompt "Is water wet? " --choice yes --choice no`
    """
    from seqmix.generate import (
        Beams,
        Contrastive,
        DiverseBeams,
        Sampling,
        Speculative,
        SpeculativeTree,
        generate_texts,
    )

    drawn = any(value is not None for value in (temperature, top_k, top_p, min_p))
    sampling = Sampling(
        temperature=(1.0 if drawn else 0.0) if temperature is None else temperature,
        top_k=top_k,
        top_p=1.0 if top_p is None else top_p,
        min_p=0.0 if min_p is None else min_p,
        repetition_penalty=repetition_penalty,
        presence_penalty=presence_penalty,
        frequency_penalty=frequency_penalty,
    )
    searches: list[Method] = []
    if groups > 1:
        searches.append(DiverseBeams(groups=groups, width=beams, strength=diversity))
    elif beams != 1:
        searches.append(Beams(width=beams))
    if contrastive is not None:
        searches.append(Contrastive(weight=contrastive))
    if sampling != Sampling(temperature=0.0):
        searches.append(sampling)
    if len(searches) > 1:
        raise ConfigError(
            "Beams, --contrastive and the options of sampling are different ways to decode. Choose one."
        )
    method = searches[0] if searches else sampling
    if draft is not None or lookup:
        if not isinstance(method, Sampling) or (draft is not None and lookup):
            raise ConfigError(
                "--draft or --lookup goes with sampling or the likeliest token alone. Choose one way."
            )
        if branches == 1:
            method = Speculative(drafter=_drafter(draft), guesses=guesses, sampling=method)
        else:
            method = SpeculativeTree(
                drafter=_tree_drafter(draft, guesses, branches), sampling=method
            )
    elif branches != 1:
        raise ConfigError("--branches goes with --draft or --lookup. Add one.")
    at_once = json or texts > 1 or isinstance(method, Beams | DiverseBeams)

    stdout = sys.stdout
    written = ""

    def show(piece: str) -> None:
        nonlocal written
        stdout.write(piece if written else prompt + piece)
        stdout.flush()
        written += piece

    with work(resume="Nothing is kept of a generation: the same command starts again."):
        found = generate_texts(
            model,
            prompt,
            texts=texts,
            new_tokens=new_tokens,
            method=method,
            constraint=_language(pattern, json_schema, choice),
            stop=stop or (),
            seed=seed,
            stream=None if at_once else show,
        )
    constrained = pattern is not None or json_schema is not None or choice
    if constrained and not all(text.is_ended for text in found):
        say("A text is cut off before its end. Raise --new-tokens for a whole one.")
    if json:
        described = [
            dataclasses.asdict(text) | {"text": prompt + text.text, "ids": len(text.ids)}
            for text in found
        ]
        for text in described:
            text["tokens"] = text.pop("ids")
        print_json(
            {"model": model, "prompt": prompt, "text": described[0]["text"], "texts": described}
        )
    elif written:
        print_text("")
    else:
        print_text("\n\n".join(prompt + text.text for text in found))


def _drafter(draft: str | None) -> Drafter:
    """The model of this name, or the text itself."""
    from seqmix.generate import DraftModel, PromptLookup
    from seqmix.models.pretrained import load_language_model

    return PromptLookup() if draft is None else DraftModel(load_language_model(draft)[0])


def _tree_drafter(draft: str | None, depth: int, width: int) -> TreeDrafter:
    """The same, guessing trees of twice as many nodes as they are deep."""
    from seqmix.generate import Shape, TreeLookup, TreeModel
    from seqmix.models.pretrained import load_language_model

    shape = Shape(depth=depth, width=width, nodes=2 * depth)
    if draft is None:
        return TreeLookup(shape=shape)
    return TreeModel(load_language_model(draft)[0], shape)


def _language(
    pattern: str | None, json_schema: Path | None, choice: list[str] | None
) -> Language | None:
    """What the options keep the text to."""
    from seqmix.generate import Choice, JsonSchema, Pattern

    languages: list[Language] = []
    if pattern is not None:
        languages.append(Pattern(pattern))
    if json_schema is not None:
        try:
            languages.append(JsonSchema(json_format.loads(json_schema.read_text("utf-8"))))
        except (OSError, ValueError, RecursionError) as error:
            raise DataError(
                f"--json-schema {json_schema}: no JSON can be read ({error})."
            ) from None
    if choice:
        languages.append(Choice(choice))
    if len(languages) > 1:
        raise ConfigError("--pattern, --json-schema and --choice exclude each other. Choose one.")
    return languages[0] if languages else None
