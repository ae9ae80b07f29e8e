"""Trains SAELens' dictionaries on activations that were computed before.

    pip install -e '.[interp-peers]'

Run by `sae_quality --peers`, in a process of its own.
"""

import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from experiments.peers import needed

RATE = 3e-3
"""Of Adam: of 1e-3 and 3e-3, that by which SAELens explains more of the demo's model.

Its default, 3e-4, is meant for longer trainings.
"""


def train(work: Path, name: str, kind: str, k: int, steps: int) -> float:
    """Trains one dictionary and writes it; returns the seconds that took.

    Args:
      work: where activations are, and dictionaries go.
      name: of the model.
      kind: of the dictionary.
      k: features of a token that are on.
      steps: updates of 2,048 tokens.
    """
    torch = needed("torch", "interp-peers")
    sae_lens = needed("sae_lens", "interp-peers")
    config = needed("sae_lens.config", "interp-peers")
    trainer_of = needed("sae_lens.training.sae_trainer", "interp-peers").SAETrainer

    torch.set_num_threads(1)
    torch.manual_seed(0)
    # Mapped, not loaded: what is read of a file does not count as the process's own.
    rows = np.load(work / f"{name}.npy", mmap_mode="r", allow_pickle=False)
    width = 8 * rows.shape[1]
    options: dict[str, Any] = {
        "d_in": rows.shape[1],
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
        lr=RATE,
        lr_end=RATE / 10,
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
        for start in range(0, len(rows), 2048):
            yield torch.from_numpy(np.array(rows[start : start + 2048]))

    trainer = trainer_of(cfg=trainer_config, sae=sae, data_provider=served())
    begun = time.monotonic()
    trained = trainer.fit()
    seconds = time.monotonic() - begun
    folder = work / f"sae-lens-{name}-{kind}"
    shutil.rmtree(folder, ignore_errors=True)
    trained.cfg.metadata.hook_name = "blocks.1.hook_resid_post"
    trained.save_inference_model(folder)
    return seconds
