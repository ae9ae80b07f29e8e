"""kronfluence's stages, as something to time (`contender.py`).

The model is the reference model as PyTorch writes it; the settings are those the engine
is timed with: sampled labels, everything in float32 but the eigendecompositions, the
library's own relative damping.
"""

import atexit
import logging
import shutil
import tempfile
from collections.abc import Callable
from typing import Any

import numpy as np

from experiments.contender import Data, Job, Stage, Stages
from experiments.peers import needed

torch = needed("torch", "peers")
F = torch.nn.functional
analyzer = needed("kronfluence.analyzer", "peers")
arguments = needed("kronfluence.arguments", "peers")
task = needed("kronfluence.task", "peers")


def stages(job: Job, data: Data) -> Stages:
    """Returns kronfluence's stages over a job's tokens."""
    torch.set_num_threads(job.threads)
    torch.manual_seed(0)
    logging.disable(logging.WARNING)
    return Kronfluence(job, data).stages()


class Block(torch.nn.Module):
    """One block of the reference model."""

    def __init__(self, width: int, hidden: int, heads: int):
        super().__init__()
        self.heads = heads
        self.ln1, self.ln2 = torch.nn.LayerNorm(width), torch.nn.LayerNorm(width)
        self.attn, self.mlp = torch.nn.Module(), torch.nn.Module()
        self.attn.qkv = torch.nn.Linear(width, 3 * width)
        self.attn.proj = torch.nn.Linear(width, width)
        self.mlp.fc1 = torch.nn.Linear(width, hidden)
        self.mlp.fc2 = torch.nn.Linear(hidden, width)

    def forward(self, x: Any) -> Any:
        """Returns the residual stream after the block."""
        qkv = self.attn.qkv(self.ln1(x)).chunk(3, dim=-1)
        q, k, v = (y.unflatten(-1, (self.heads, -1)).transpose(1, 2) for y in qkv)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.attn.proj(y.transpose(1, 2).flatten(2))
        up = F.gelu(self.mlp.fc1(self.ln2(x)), approximate="tanh")
        return x + self.mlp.fc2(up)


class GPT(torch.nn.Module):
    """The reference model."""

    def __init__(self, job: Job, params: dict[str, np.ndarray]):
        super().__init__()
        self.tok_emb = torch.nn.Embedding(job.vocabulary, job.width)
        self.pos_emb = torch.nn.Embedding(job.context, job.width)
        self.blocks = torch.nn.ModuleList(
            Block(job.width, job.hidden, job.heads) for _ in range(job.blocks)
        )
        self.ln_f = torch.nn.LayerNorm(job.width)
        self.lm_head = torch.nn.Linear(job.width, job.vocabulary)
        self.load_state_dict({k: torch.from_numpy(x) for k, x in params.items()})

    def forward(self, ids: Any) -> Any:
        """Returns logits, `[B, T, V]`."""
        x = self.tok_emb(ids) + self.pos_emb.weight[: ids.shape[1]]
        for block in self.blocks:
            x = block(x)
        return self.lm_head(self.ln_f(x))


def summed_loss(logits: Any, labels: Any) -> Any:
    """Returns the loss of all predicted tokens; the last position predicts none."""
    return F.cross_entropy(
        logits[:, :-1].flatten(0, 1), labels.flatten(), reduction="sum"
    )


class Task(task.Task):
    """Next-token prediction, for kronfluence."""

    def __init__(self, names: list[str]):
        super().__init__()
        self.names = names

    def compute_train_loss(self, batch: Any, model: Any, sample: bool = False) -> Any:
        """Returns the loss of a batch, its labels sampled or its own."""
        logits, labels = model(batch), batch[:, 1:]
        if sample:
            with torch.no_grad():
                p = logits[:, :-1].flatten(0, 1).softmax(-1)
                labels = torch.multinomial(p, 1)
        return summed_loss(logits, labels)

    def compute_measurement(self, batch: Any, model: Any) -> Any:
        """Returns the same: a query is a sequence's log-probability."""
        return self.compute_train_loss(batch, model)

    def get_influence_tracked_modules(self) -> list[str]:
        """Returns the layers that are read."""
        return self.names


class Kronfluence:
    """The stages, and the factors on disk they leave for one another."""

    def __init__(self, job: Job, data: Data):
        self.job = job
        self.train, self.queries = (
            torch.from_numpy(x.astype(np.int64)) for x in (data.train, data.queries)
        )
        self.plain = GPT(job, data.params)
        folder = tempfile.mkdtemp()
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
        work = Task(job.names())
        tracked = analyzer.prepare_model(GPT(job, data.params).eval(), work)
        self.analyzer = analyzer.Analyzer(
            "timed", tracked, work, cpu=True, disable_tqdm=True, output_dir=folder
        )
        self.factors = arguments.FactorArguments(
            strategy="ekfac",
            covariance_max_examples=None,
            lambda_max_examples=None,
            eigendecomposition_dtype=torch.float64,
        )

    def stages(self) -> Stages:
        """Returns them by name."""
        job, rank = self.job, self.job.rank
        low = f", rank {rank}"
        few = job.token_sequences

        def queries(**options: Any) -> Stage:
            tokens, two = job.queries * job.context, self.queries[:2]
            return Stage(
                tokens,
                lambda: self.score(self.train[:1], self.queries, 1, **options),
                lambda: self.score(self.train[:1], two, 1, **options),
            )

        def scan(kind: str, sequences: int = job.sequences, **options: Any) -> Stage:
            def work(ids: Any, size: int) -> None:
                self.score(ids, self.queries, size, **options)

            return self._over_data(kind, work, sequences)

        per_token = {"compute_per_token_scores": True}
        reduced = {"query_gradient_low_rank": rank}
        return {
            "forward+backward": self._over_data("unit", self.unit, job.sequences),
            "covariance": self._over_data("covariance", self.covariance, job.sequences),
            "eigendecomposition": Stage(None, self.decompose, self.decompose),
            "eigenvalues": self._over_data(
                "eigenvalues", self.eigenvalues, job.sequences
            ),
            "query": queries(),
            "scan": scan("scan"),
            "scan, per layer": scan("scan", compute_per_module_scores=True),
            "scan, per token": scan("tokens", few, **per_token),
            f"query{low}": queries(**reduced),
            f"scan{low}": scan("low rank", **reduced),
            f"scan, per token{low}": scan("tokens", few, **per_token, **reduced),
        }

    def _over_data(
        self, kind: str, work: Callable[[Any, int], None], sequences: int
    ) -> Stage:
        size, ids = self.job.size("kronfluence", kind), self.train[:sequences]
        return Stage(
            ids.numel(), lambda: work(ids, size), lambda: work(ids[:size], size)
        )

    def unit(self, ids: Any, size: int) -> None:
        """Computes every batch's loss and gradient, and nothing of them."""
        for batch in ids.split(size):
            self.plain.zero_grad(set_to_none=True)
            summed_loss(self.plain(batch), batch[:, 1:]).backward()

    def covariance(self, ids: Any, size: int) -> None:
        """Sums covariances."""
        self.analyzer.fit_covariance_matrices(
            "fitted",
            list(ids),
            per_device_batch_size=size,
            factor_args=self.factors,
            overwrite_output_dir=True,
        )

    def decompose(self) -> None:
        """Takes the covariances' eigenvectors."""
        self.analyzer.perform_eigendecomposition(
            "fitted", factor_args=self.factors, overwrite_output_dir=True
        )

    def eigenvalues(self, ids: Any, size: int) -> None:
        """Refits eigenvalues."""
        self.analyzer.fit_lambda_matrices(
            "fitted",
            list(ids),
            per_device_batch_size=size,
            factor_args=self.factors,
            overwrite_output_dir=True,
        )

    def score(self, ids: Any, queries: Any, size: int, **options: Any) -> None:
        """Solves for queries, all in one batch, and scans for them."""
        self.analyzer.compute_pairwise_scores(
            "scores",
            "fitted",
            query_dataset=list(queries),
            train_dataset=list(ids),
            per_device_query_batch_size=len(queries),
            per_device_train_batch_size=size,
            # None is kronfluence's name for 0.1 of the mean eigenvalue.
            score_args=arguments.ScoreArguments(damping_factor=None, **options),
            overwrite_output_dir=True,
        )
