"""bergson's stages, as something to time (`contender.py`).

The model is the reference model as transformers has it; the settings are those the
engine is timed with: sampled labels, everything in float32 but the eigendecompositions,
damping 0.1 of the mean eigenvalue.

The library's own steps are carried out, with the files they leave for one another. Only
the model is loaded once, where they would read it anew for every step: over thousands
of sequences that is nothing, and over the few that are timed it would be much.
"""

import atexit
import logging
import os
import shutil
import tempfile
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np

from experiments.contender import Data, Job, Stage, Stages
from experiments.peers import needed

os.environ |= {"HF_HUB_OFFLINE": "1", "WANDB_MODE": "disabled", "TQDM_DISABLE": "1"}

torch = needed("torch", "peers")
transformers = needed("transformers", "peers")
datasets = needed("datasets", "peers")
tokenizers = needed("tokenizers", "peers")
config = needed("bergson.config.config", "peers")
build = needed("bergson.build", "peers")
hessians = needed("bergson.hessians.hessian_approximations", "peers")
eigenvectors = needed("bergson.hessians.eigenvectors", "peers")
inverse = needed("bergson.hessians.apply_hessian", "peers")
score = needed("bergson.score.score", "peers")

POSITIONS = 16384
"""Of the model that bergson is given: it takes no batch of more tokens than that."""

NAMES = {
    "attn.qkv": "attn.c_attn",
    "attn.proj": "attn.c_proj",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
}
"""transformers' names of a block's matrices, by those of the reference model."""


def stages(job: Job, data: Data) -> Stages:
    """Returns bergson's stages over a job's tokens."""
    torch.set_num_threads(job.threads)
    torch.manual_seed(0)
    logging.disable(logging.WARNING)
    return Bergson(job, data).stages()


def gpt2(job: Job, params: dict[str, np.ndarray]) -> Any:
    """Returns the reference model as a GPT-2 of transformers.

    Which has no bias of the head: the norm before it takes it on, which gives the same
    logits where a vocabulary is smaller than the width.
    """
    settings = transformers.GPT2Config(
        vocab_size=job.vocabulary,
        n_positions=POSITIONS,
        n_embd=job.width,
        n_layer=job.blocks,
        n_head=job.heads,
        n_inner=job.hidden,
        activation_function="gelu_new",
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        tie_word_embeddings=False,
        use_cache=False,
        bos_token_id=0,
        eos_token_id=0,
    )
    positions = np.zeros((POSITIONS, job.width), np.float32)
    positions[: job.context] = params["pos_emb.weight"]
    head = params["lm_head.weight"].astype(np.float64)
    bias = params["ln_f.bias"] + np.linalg.pinv(head) @ params["lm_head.bias"]
    weights = {
        "transformer.wte.weight": params["tok_emb.weight"],
        "transformer.wpe.weight": positions,
        "transformer.ln_f.weight": params["ln_f.weight"],
        "transformer.ln_f.bias": bias.astype(np.float32),
        "lm_head.weight": params["lm_head.weight"],
    }
    for i in range(job.blocks):
        there, here = f"transformer.h.{i}", f"blocks.{i}"
        for kind in ("weight", "bias"):
            for j in (1, 2):
                weights[f"{there}.ln_{j}.{kind}"] = params[f"{here}.ln{j}.{kind}"]
            for name, other in NAMES.items():
                # transformers keeps `[I, O]`; a bias is its own transpose.
                weights[f"{there}.{other}.{kind}"] = params[f"{here}.{name}.{kind}"].T
    model = transformers.GPT2LMHeadModel(settings).eval()
    given = {k: torch.from_numpy(np.ascontiguousarray(x)) for k, x in weights.items()}
    model.load_state_dict(given)
    return model


def tokenizer(vocabulary: int) -> Any:
    """Returns a tokenizer that is never asked: bergson reads one beside the model."""
    words = {chr(ord("a") + i): i for i in range(vocabulary)}
    model = tokenizers.models.WordLevel(words, unk_token="a")
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizers.Tokenizer(model),
        model_max_length=POSITIONS,
        eos_token="a",
        pad_token="a",
    )


def dataset(ids: np.ndarray, folder: Path) -> Path:
    """Writes token ids as bergson reads them, and returns where to."""
    columns = {"input_ids": ids.tolist(), "length": [ids.shape[1]] * len(ids)}
    with redirect_stdout(StringIO()), redirect_stderr(StringIO()):
        datasets.Dataset.from_dict(columns).save_to_disk(str(folder))
    return folder


class Bergson:
    """The stages, and the folders they leave for one another."""

    def __init__(self, job: Job, data: Data):
        self.job, self.data = job, data
        self.folder = Path(tempfile.mkdtemp())
        atexit.register(shutil.rmtree, self.folder, ignore_errors=True)
        self.model = gpt2(job, data.params)
        self.model.save_pretrained(self.folder / "model")
        tokenizer(job.vocabulary).save_pretrained(self.folder / "model")
        for module in (build, score):
            module.setup_model_and_peft = lambda *_, **__: (self.model, None)

    def stages(self) -> Stages:
        """Returns them by name; those it has."""
        job, train, queries = self.job, self.data.train, self.data.queries
        few = train[: job.token_sequences]

        def scan(**options: Any) -> Callable[[Path, int], None]:
            return lambda ids, size: self.scan(ids, size, **options)

        return {
            "forward+backward": self._over("unit", self.unit, train),
            "covariance": self._over("covariance", self.covariance, train),
            "eigendecomposition": Stage(None, self.decompose, self.decompose),
            "eigenvalues": self._over("eigenvalues", self.eigenvalues, train),
            "query": self._over("query", self.query, queries),
            "scan": self._over("scan", scan(), train),
            "scan, per token": self._over("tokens", scan(attribute_tokens=True), few),
        }

    def _over(
        self, kind: str, work: Callable[[Path, int], None], ids: np.ndarray
    ) -> Stage:
        size = min(self.job.size("bergson", kind), len(ids))
        whole = dataset(ids, self.folder / f"{kind} ids")
        one = dataset(ids[:size], self.folder / f"{kind} first")

        def quietly(of: Path) -> None:
            with redirect_stdout(StringIO()), redirect_stderr(StringIO()):
                work(of, size)

        return Stage(ids.size, lambda: quietly(whole), lambda: quietly(one))

    def _config(self, out: Path, ids: Path, size: int, **options: Any) -> Any:
        """Returns bergson's settings of a step that begins anew."""
        shutil.rmtree(out, ignore_errors=True)
        return config.IndexConfig(
            run_path=str(out),
            overwrite=True,
            model=str(self.folder / "model"),
            data=config.DataConfig(dataset=str(ids)),
            token_batch_size=size * self.job.context,
            include_bias=True,
            filter_modules="h.*.attn.*" if self.job.layers == "mlp" else None,
            projection_dim=0,
            precision="fp32",
            loss_reduction="sum",
            **options,
        )

    def unit(self, ids: Path, size: int) -> None:
        """Computes every batch's loss and gradient, and nothing of them."""
        rows = torch.tensor(datasets.load_from_disk(str(ids))["input_ids"][:])
        for batch in rows.split(size):
            self.model.zero_grad(set_to_none=True)
            logits = self.model(batch).logits[:, :-1].flatten(0, 1)
            loss = torch.nn.functional.cross_entropy
            loss(logits, batch[:, 1:].flatten(), reduction="sum").backward()
        self.model.zero_grad(set_to_none=True)

    def covariance(self, ids: Path, size: int) -> None:
        """Sums covariances."""
        self._fit(ids, size)

    def decompose(self) -> None:
        """Takes the covariances' eigenvectors."""
        total = torch.load(self.kept / "total_processed.pt", weights_only=True)
        with redirect_stdout(StringIO()), redirect_stderr(StringIO()):
            for side in ("activation", "gradient"):
                path = str(self.kept / f"{side}_sharded")
                eigenvectors.compute_eigendecomposition(path, total_processed=total)

    def eigenvalues(self, ids: Path, size: int) -> None:
        """Refits eigenvalues."""
        self._fit(ids, size, ev_correction=True)

    @property
    def kept(self) -> Path:
        """Returns where curvature is."""
        return self.folder / "curvature"

    def _fit(self, ids: Path, size: int, **options: Any) -> None:
        rows = datasets.load_from_disk(str(ids))
        settings = self._config(self.folder / "pass", ids, size)
        self.kept.mkdir(exist_ok=True)
        settings.partial_run_path.mkdir(parents=True, exist_ok=True)
        batches = build.allocate_batches(rows["length"][:], settings.token_batch_size)
        hessians.collect_hessians(
            self.model,
            rows,
            settings,
            batches=batches,
            hessian_cfg=config.HessianConfig(method="kfac", ev_correction=True),
            path=str(self.kept),
            num_documents=len(rows),
            **options,
        )
        total = settings.partial_run_path / "total_processed.pt"
        if total.exists():
            shutil.move(total, self.kept / total.name)

    def query(self, ids: Path, size: int) -> None:
        """Takes the queries' gradients and solves for them."""
        found, solved = self.folder / "gradients", self.folder / "solved"
        shutil.rmtree(solved, ignore_errors=True)
        settings = self._config(found, ids, size)
        asked = config.QuerySetConfig(dataset=str(ids), aggregation="none")
        build.build_query(settings, asked, config.PreprocessConfig())
        applied = inverse.EkfacConfig(
            hessian_method_path=str(self.kept),
            gradient_path=str(found),
            run_path=str(solved),
            ev_correction=True,
            apply_batch_size=self.job.queries,
        )
        damping = config.InversionConfig(damping_factor=self.job.damping)
        inverse.apply_worker(0, 0, 1, applied, damping)

    def scan(self, ids: Path, size: int, **options: Any) -> None:
        """Scores every sequence, or every position of some."""
        settings = self._config(self.folder / "scores", ids, size, **options)
        asked = config.ScoreConfig(query_path=str(self.folder / "solved"))
        score.score_dataset(settings, asked, config.PreprocessConfig())
