"""``loku alternates``: let a model write alternates to the answers of a forget set, for the method altpo."""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path

from loku.commands import CommandParser, Commands, accept_underscores, check_local, json_object

DESCRIPTION = """\
Let a model write other plausible answers to the questions of a forget set, by sampling, and write the rows
with the column "alternate", a list of texts. "loku unlearn --method altpo" prefers these to the true
answers."""


def add(commands: Commands[CommandParser]) -> CommandParser:
    """Add the parser of the command, and return it."""
    parser = commands.add_parser(
        "alternates",
        help="let a model write alternate answers to a forget set, for --method altpo",
        description=DESCRIPTION,
    )
    parser.add_argument(
        "--model", required=True, metavar="PATH", help="path or hub name of the causal LM to unlearn"
    )
    parser.add_argument(
        "--forget",
        required=True,
        metavar="FILE",
        help="the rows, with the columns question and answer, in a form that loku unlearn reads",
    )
    parser.add_argument(
        "--output",
        required=True,
        metavar="FILE",
        help="the JSON Lines file to write, which must not be there",
    )
    parser.add_argument("--count", type=int, default=5, help="alternates of a row (default: 5)")
    parser.add_argument("--seed", type=int, default=0, help="the seed of the samples (default: 0)")
    parser.add_argument("--temperature", type=float, default=1.0, help="divides the logits (default: 1)")
    parser.add_argument(
        "--top-p", type=float, default=1.0, help="the probability of the nucleus (default: 1, all words)"
    )
    parser.add_argument(
        "--max-new-tokens", type=int, default=200, help="tokens of an alternate at most (default: 200)"
    )
    parser.add_argument(
        "--prompt", metavar="FILE", help="a text file with the prompt, in which {question} and {answer} stand"
    )
    parser.add_argument("--tokenizer", metavar="PATH", help="path or hub name (default: the model's)")
    parser.add_argument(
        "--model-init-kwargs",
        type=json_object,
        default={},
        metavar="JSON",
        help="arguments of from_pretrained, a JSON object",
    )
    parser.add_argument("--batch-size", type=int, default=16, help="prompts at once (default: 16)")
    parser.add_argument("--quiet", action="store_true", help="no progress bars")
    parser.set_defaults(run=run)
    accept_underscores(parser)
    return parser


def run(options: argparse.Namespace) -> None:
    """Run the command with its parsed options."""
    output = Path(options.output)
    if os.path.lexists(output):
        raise ValueError(f"--output {output} is there already; name a new file")
    if not output.parent.is_dir():
        raise ValueError(f"--output {output}: there is no folder {output.parent}")
    check_local("--model", options.model)
    if options.tokenizer:
        check_local("--tokenizer", options.tokenizer)

    import torch
    from accelerate import PartialState

    from loku.alternates import PROMPT, make_alternates
    from loku.data import infer_tokenizer, read_rows, row_places
    from loku.data.files import read_text
    from loku.models import load_model
    from loku.trust import load_tokenizer, trusts_code

    prompt = read_text(Path(options.prompt)) if options.prompt else PROMPT
    rows = read_rows(options.forget)
    model = load_model(options.model, options.model_init_kwargs)
    tokenizer = infer_tokenizer(model)
    if options.tokenizer:
        tokenizer = load_tokenizer(
            options.tokenizer, trust_remote_code=trusts_code(options.model_init_kwargs)
        )
    device = PartialState(cpu=not torch.accelerator.is_available()).device
    with row_places({"forget": options.forget}):
        found = make_alternates(
            model.to(device),
            tokenizer,
            rows,
            options.count,
            seed=options.seed,
            prompt=prompt,
            temperature=options.temperature,
            top_p=options.top_p,
            max_new_tokens=options.max_new_tokens,
            batch_size=options.batch_size,
            progress=not options.quiet,
        )
    with open(output, "x", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in found)
    print(f"{output}: {len(found)} rows with {options.count} alternates each")
