"""Trains SAELens' dictionaries on activations that were computed before.

    pip install -e '.[interp-peers]'

Run by `sae_quality --peers`, in a process of its own.
"""

import json
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import tyro

from experiments.peers import needed


def main(
    rows: Path, out: Path, kind: str, site: str, k: int, steps: int, rate: float
) -> None:
    """Trains one dictionary, writes it, and prints how fast that was.

    Args:
      rows: the activations, `[N, D]`.
      out: the folder for the dictionary.
      kind: of the dictionary, `topk` or `batchtopk`.
      site: where the activations are from.
      k: features of a token that are on.
      steps: updates of 2,048 tokens.
      rate: of Adam; it falls to a tenth over the last fifth.
    """
    torch = needed("torch", "interp-peers")
    sae_lens = needed("sae_lens", "interp-peers")
    config = needed("sae_lens.config", "interp-peers")
    trainer_of = needed("sae_lens.training.sae_trainer", "interp-peers").SAETrainer

    torch.set_num_threads(1)
    torch.manual_seed(0)
    # Mapped, not loaded: what is read of a file does not count as the process's own.
    values = np.load(rows, mmap_mode="r", allow_pickle=False)
    width = 8 * values.shape[1]
    options: dict[str, Any] = {
        "d_in": values.shape[1],
        "d_sae": width,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": True,
    }
    own = {
        "topk": (sae_lens.TopKTrainingSAE, sae_lens.TopKTrainingSAEConfig, {"k": k}),
        "batchtopk": (
            sae_lens.BatchTopKTrainingSAE,
            sae_lens.BatchTopKTrainingSAEConfig,
            {"k": k},
        ),
    }
    make, about, rest = own[kind]
    sae = make(about(**options, **rest))
    trainer_config = config.SAETrainerConfig(
        n_checkpoints=0,
        checkpoint_path=None,
        save_final_checkpoint=False,
        total_training_samples=steps * 2048,
        device="cpu",
        autocast=False,
        lr=rate,
        lr_end=rate / 10,
        lr_scheduler_name="constant",
        lr_warm_up_steps=steps // 20,
        adam_beta1=0.9,
        adam_beta2=0.999,
        lr_decay_steps=steps // 5,
        n_restart_cycles=1,
        train_batch_size_samples=2048,
        dead_feature_window=100,
        feature_sampling_window=1000,
        logger=config.LoggingConfig(log_to_wandb=False),
    )

    def served() -> Iterator[Any]:
        for start in range(0, len(values), 2048):
            yield torch.from_numpy(np.array(values[start : start + 2048]))

    trainer = trainer_of(cfg=trainer_config, sae=sae, data_provider=served())
    begun = time.monotonic()
    trained = trainer.fit()
    seconds = time.monotonic() - begun
    shutil.rmtree(out, ignore_errors=True)
    trained.cfg.metadata.hook_name = site
    trained.save_inference_model(out)
    print(json.dumps({"tokens_per_second": steps * 2048 / seconds}))  # noqa: T201


if __name__ == "__main__":
    tyro.cli(main)
