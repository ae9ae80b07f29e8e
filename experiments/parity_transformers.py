"""Do decoders here compute what transformers computes, and open there again?

    python -m experiments.parity_transformers [--families llama gpt2 …]

Tiny models of every family with random weights, norms and biases included, written by
transformers (PyTorch), in several variants: sharded files, tied heads, fewer key/value
heads than heads, heads wider than the width divided by them, a vocabulary padded to a
multiple; and LoRA adapters written by PEFT. Of each:

* logits, the largest absolute difference, in float32;
* greedy continuations, token for token, up to where the two likeliest tokens are within
  1e-3;
* the way back: what is saved here opens in transformers with no tensor missing or
  beside, and gives the logits that the model gave here, weights changed meanwhile.

The last line printed is JSON, `{family: {"logits": error, "greedy": whether,
"roundtrip": whether}}`, the worst of all variants. `--golden DIR` writes a model of
every family with its logits, for the tests. Needs `pip install -e '.[parity]'`.
"""

import argparse
import json
import shutil
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from safetensors.numpy import save_file

from experiments.decoder_cases import CASES, Case
from experiments.peers import needed
from influence.model.generate import generate
from influence.runtime import checkpoints
from influence.types import named_leaves, with_leaves

peft, torch, transformers = (
    needed(x, "parity") for x in ("peft", "torch", "transformers")
)

LOGITS, TIE, STEPS = 1e-4, 1e-3, 12
"""How far logits may differ; when two tokens are as likely; how many are generated."""

TOKENS = np.arange(40)[None]
"""What models are compared on that were written here."""


@dataclass(frozen=True)
class Result:
    """How one model compares.

    Attributes:
      logits: the largest difference.
      greedy: whether continuations are the same.
      compared: how many of their tokens come before two are as likely.
      roundtrip: whether it opens elsewhere as what it is here.
    """

    logits: float
    greedy: bool
    compared: int
    roundtrip: bool

    @property
    def passed(self) -> bool:
        """Returns whether it is the same model."""
        return self.logits <= LOGITS and self.greedy and self.roundtrip


def compare(case: Case, folder: Path) -> Result:
    """Returns how a model written by transformers compares with what is read of it."""
    theirs = make(case, folder / "theirs")
    files = len([*(folder / "theirs").glob("*.safetensors")])
    if files > 1 and case.shard > 4096 or files == 1 and case.shard == 4096:
        raise ValueError(f"transformers wrote {files} files of {case.shard} bytes.")
    loaded = checkpoints.load(folder / "theirs")
    tokens = np.random.default_rng(0).integers(0, case.words["vocab_size"], (3, 40))
    errors = [difference(theirs, loaded, tokens)]
    if case.adapter:
        errors.append(difference(theirs, checkpoints.merged(loaded), tokens))
    greedy, compared = same_continuations(theirs, loaded, tokens)
    return Result(max(errors), greedy, compared, back(loaded, folder))


def make(case: Case, folder: Path) -> Any:
    """Returns a random model of transformers', written into a folder."""
    torch.manual_seed(0)
    words = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
    config = case.config(**{**words, **case.words}, attn_implementation="eager")
    model = transformers.AutoModelForCausalLM.from_config(config)
    if case.multiple:
        model.resize_token_embeddings(pad_to_multiple_of=case.multiple)
    randomise(model)
    model.save_pretrained(str(folder), max_shard_size=case.shard)
    if not case.adapter:
        return model.eval()
    base = folder.with_name("base")
    shutil.move(folder, base)
    lora = peft.LoraConfig(task_type="CAUSAL_LM", **case.adapter)
    model = peft.get_peft_model(model, lora)
    randomise(model)
    model.peft_config["default"].base_model_name_or_path = str(base)
    model.save_pretrained(str(folder))
    return opened(folder)


def randomise(model: Any) -> None:
    """Draws all weights that are trained anew, norms and biases included."""
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.requires_grad:
                around = float(weight.mean()) if "norm" in name or "ln_" in name else 0
                weight.normal_(around, 0.3)


def opened(folder: Path) -> Any:
    """Returns a model as transformers or PEFT reads it from a folder.

    Raises:
      ValueError: if tensors are missing or beside.
    """
    if (folder / "adapter_config.json").exists():
        read = peft.AutoPeftModelForCausalLM.from_pretrained
        return read(folder, attn_implementation="eager").eval()
    read: Any = transformers.AutoModelForCausalLM.from_pretrained
    model, said = read(folder, attn_implementation="eager", output_loading_info=True)
    odd = {k: sorted(x) for k, x in said.items() if x}
    if odd:
        raise ValueError(f"transformers says of {folder}: {odd}")
    return model.eval()


def difference(theirs: Any, loaded: checkpoints.Loaded, tokens: np.ndarray) -> float:
    """Returns the largest difference of two models' logits."""
    found = loaded.apply(loaded.params, jnp.asarray(tokens))
    return float(np.abs(np.asarray(found) - logits(theirs, tokens)).max())


def logits(model: Any, tokens: np.ndarray) -> np.ndarray:
    """Returns the logits of a model of transformers'."""
    with torch.no_grad():
        return model(input_ids=torch.tensor(tokens)).logits.numpy()


def same_continuations(
    theirs: Any, loaded: checkpoints.Loaded, tokens: np.ndarray
) -> tuple[bool, int]:
    """Returns whether both continue prompts alike, until two tokens are as likely.

    And over how many tokens that is.
    """
    prompts = [row[:n].tolist() for row, n in zip(tokens, (5, 9, 16), strict=True)]
    found = generate(loaded.apply, loaded.params, prompts, STEPS)
    same, compared = True, 0
    for prompt, made in zip(prompts, found, strict=True):
        ids = torch.tensor([prompt])
        whole = theirs.generate(input_ids=ids, do_sample=False, max_new_tokens=STEPS)
        expected = whole[0, len(prompt) :].tolist()
        seen = np.sort(logits(theirs, whole.numpy())[0, len(prompt) - 1 : -1], axis=-1)
        tied = np.flatnonzero(seen[:, -1] - seen[:, -2] < TIE)
        clear = int(tied[0]) if len(tied) else STEPS
        same, compared = same and made[:clear] == expected[:clear], compared + clear
    return same, compared


def back(loaded: checkpoints.Loaded, folder: Path) -> bool:
    """Returns whether a changed model opens in transformers as what it is here."""
    params = jax.tree.map(lambda x: x * 1.01 + 0.01, loaded.params)
    changed = replace(loaded, params=params)
    if loaded.adapter is None:
        checkpoints.save(folder / "ours", changed, max_shard_bytes=8000)
        same = _same_config(folder)
    else:
        leaves = named_leaves(loaded.params)
        kept = {k: x for k, x in leaves.items() if ".lora." not in k}
        changed = replace(changed, params=with_leaves(changed.params, kept))
        checkpoints.save_adapter(folder / "ours", changed)
        checkpoints.save(folder / "merged", checkpoints.merged(changed))
        same = difference(opened(folder / "merged"), changed, TOKENS) <= LOGITS
    return same and difference(opened(folder / "ours"), changed, TOKENS) <= LOGITS


def _same_config(folder: Path) -> bool:
    read = [
        json.loads((folder / x / "config.json").read_text()) for x in ("ours", "theirs")
    ]
    return read[0] == read[1]


def write_golden(folder: Path) -> None:
    """Writes a model of every family, with its logits on some tokens."""
    for family, cases in CASES.items():
        if family != "peft":
            where = folder / family
            shutil.rmtree(where, ignore_errors=True)
            model = make(next(iter(cases.values())), where)
            (where / "generation_config.json").unlink()
            arrays = {"tokens": TOKENS, "logits": logits(model, TOKENS)}
            save_file(arrays, where / "expected.safetensors")


def main() -> None:
    """Prints how every model compares, the last line as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--families", nargs="+", choices=CASES, default=[*CASES])
    parser.add_argument("--golden", type=Path, help="where to write models for tests")
    given, console = parser.parse_args(), Console()
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    if given.golden is not None:
        write_golden(given.golden)
    found: dict[str, list[Result]] = {x: [] for x in given.families}
    for family in given.families:
        for variant, case in CASES[family].items():
            with (
                tempfile.TemporaryDirectory() as folder,
                jax.default_matmul_precision("highest"),
            ):
                result = compare(case, Path(folder))
            found[family].append(result)
            said = "same" if result.passed else "NOT THE SAME"
            tokens = f"{result.compared} of {3 * STEPS} tokens compared"
            console.print(f"{family}, {variant}: {result.logits:.1e}, {tokens}, {said}")
    worst = {
        family: {
            "logits": max(x.logits for x in results),
            "greedy": all(x.greedy for x in results),
            "roundtrip": all(x.roundtrip for x in results),
        }
        for family, results in found.items()
    }
    console.print(json.dumps(worst), soft_wrap=True, highlight=False)
    if not all(x.passed for results in found.values() for x in results):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
