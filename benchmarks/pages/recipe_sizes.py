"""Parameters and memory of each recipe's models, built from the flags that the recipe prints.

    python -m benchmarks.pages.recipe_sizes             print the sizes
    python -m benchmarks.pages.recipe_sizes --write     also update the table in docs/recipes.md

Nothing is trained: each model is built with a dictionary of the recipe's size. Memory is
calculated, not measured: weights, gradients and Adam's two moments take 16 bytes per parameter in
fp32, and activations come on top. MACs are those of the hard stage (one expert per token), with
half a sample of context.
"""

import argparse
import contextlib
import io
import shlex
import subprocess
from pathlib import Path

from fairseq import options, tasks
from fairseq.data import Dictionary
from fairseq.dataclass.utils import convert_namespace_to_omegaconf

from benchmarks import ROOT
from benchmarks.pages.tables import fill, line
from fairseq_evomoe.tools.cost import costs, total

RECIPES = (
    ("multi30k", (), "dense evomoe memoryformer", 4000, 20),
    ("iwslt14_de_en", (), "dense evomoe memoryformer", 10000, 30),
    ("wmt14_en_de", (), "dense evomoe memoryformer", 32000, 30),
    ("wmt14_en_de", ("--size", "big"), "dense evomoe", 32000, 30),
    ("wikitext103", ("--task", "lm"), "dense evomoe memoryformer", 32000, 256),
    ("wikitext103", ("--task", "mlm"), "dense evomoe", 32000, 256),
)
"""(Recipe, its options, its models, pieces in the dictionary, context length) of each line."""


def built(recipe: str, told: tuple[str, ...], model: str, pieces: int, folder: Path):
    """Build the model that `run.sh --model MODEL --print` names, and set it to its last stage."""
    command = [
        "bash",
        str(ROOT / "recipes" / recipe / "run.sh"),
        "--model",
        model,
        "--print",
        *told,
    ]
    printed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    words = shlex.split(printed.stdout.splitlines()[-1])[1:]
    words[0] = str(folder)
    words += ["--cpu"]
    args = options.parse_args_and_arch(options.get_training_parser(), words)
    cfg = convert_namespace_to_omegaconf(args)
    dictionary = Dictionary()
    for i in range(pieces):
        dictionary.add_symbol(f"p{i}", pieces - i)
    for name in {"", getattr(cfg.task, "source_lang", ""), getattr(cfg.task, "target_lang", "")}:
        dictionary.save(str(folder / f"dict{name and '.' + str(name)}.txt"))
    with contextlib.redirect_stderr(io.StringIO()):
        made = tasks.setup_task(cfg.task).build_model(cfg.model)
    made.set_num_updates(10**9)
    for module in made.modules():
        if hasattr(module, "spawned"):
            module.spawned = True
    return made


def main() -> None:
    import tempfile

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="bring docs/recipes.md up to date")
    args = parser.parse_args()
    rows = []
    for recipe, told, models, pieces, context in RECIPES:
        for model in models.split():
            with tempfile.TemporaryDirectory() as folder:
                made = built(recipe, told, model, pieces, Path(folder))
            count = sum(p.numel() for p in made.parameters())
            hidden = dict.fromkeys(("encoder", "decoder"), 10**4)
            macs = total(list(costs(made, context=context, hidden=hidden)))["total"]["macs"]
            name = " ".join([recipe, *(x for x in told if not x.startswith("--"))])
            memory = 16 * count / 1e9
            cells = [name, model, f"{count / 1e6:.1f}", f"{macs / 1e6:.1f}", f"{memory:.2f}"]
            rows.append(cells)
            print(*cells, flush=True)
    head = [
        "recipe",
        "model",
        "parameters, M",
        "MMAC per token",
        "GB for weights, gradients and moments, fp32",
    ]
    text = "\n".join(line(r) for r in [head, ["---"] * len(head), *rows]) + "\n"
    if args.write:
        fill(ROOT / "docs/recipes.md", "sizes", text)


if __name__ == "__main__":
    main()
