"""Trains SAELens' dictionaries on activations that were computed before.

    pip install -e '.[interp-peers]'

Run by `sae_quality --peers`, in a process of its own.
"""

import json
import shutil
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import tyro

from experiments.given import BATCH, Given
from experiments.peers import needed


def main(given: Given) -> None:
    """Trains one dictionary, writes it, and prints how fast that was.

    Its rate falls to a tenth over the last fifth.
    """
    torch = needed("torch", "interp-peers")
    sae_lens = needed("sae_lens", "interp-peers")
    config = needed("sae_lens.config", "interp-peers")
    trainer_of = needed("sae_lens.training.sae_trainer", "interp-peers").SAETrainer

    torch.set_num_threads(1)
    torch.manual_seed(0)
    # Mapped, not loaded: what is read of a file does not count as the process's own.
    values = np.load(given.rows, mmap_mode="r", allow_pickle=False)
    width = 8 * values.shape[1]
    options: dict[str, Any] = {
        "d_in": values.shape[1],
        "d_sae": width,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": True,
    }
    own = {
        "topk": (
            sae_lens.TopKTrainingSAE,
            sae_lens.TopKTrainingSAEConfig,
            {"k": given.k},
        ),
        "batchtopk": (
            sae_lens.BatchTopKTrainingSAE,
            sae_lens.BatchTopKTrainingSAEConfig,
            {"k": given.k},
        ),
    }
    make, about, rest = own[given.kind]
    sae = make(about(**options, **rest))
    trainer_config = config.SAETrainerConfig(
        n_checkpoints=0,
        checkpoint_path=None,
        save_final_checkpoint=False,
        total_training_samples=given.steps * BATCH,
        device="cpu",
        autocast=False,
        lr=given.rate,
        lr_end=given.rate / 10,
        lr_scheduler_name="constant",
        lr_warm_up_steps=given.steps // 20,
        adam_beta1=0.9,
        adam_beta2=0.999,
        lr_decay_steps=given.steps // 5,
        n_restart_cycles=1,
        train_batch_size_samples=BATCH,
        dead_feature_window=100,
        feature_sampling_window=1000,
        logger=config.LoggingConfig(log_to_wandb=False),
    )

    def served() -> Iterator[Any]:
        for start in range(0, len(values), BATCH):
            yield torch.from_numpy(np.array(values[start : start + BATCH]))

    trainer = trainer_of(cfg=trainer_config, sae=sae, data_provider=served())
    begun = time.monotonic()
    trained = trainer.fit()
    seconds = time.monotonic() - begun
    shutil.rmtree(given.out, ignore_errors=True)
    trained.cfg.metadata.hook_name = given.site
    trained.save_inference_model(given.out)
    print(json.dumps({"tokens_per_second": given.steps * BATCH / seconds}))  # noqa: T201


if __name__ == "__main__":
    main(tyro.cli(Given, description=__doc__))
