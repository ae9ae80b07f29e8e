"""Trains a dictionary on as many devices as there are, and prints it."""

import json

import jax

jax.config.update("jax_enable_x64", True)

from influence.fold import run  # noqa: E402
from influence.interpret import training  # noqa: E402
from influence.interpret.kinds import BatchTop  # noqa: E402
from influence.interpret.learning import Aim, Schedule, begin  # noqa: E402
from influence.interpret.source import Epochs  # noqa: E402
from tests.interpret import cases  # noqa: E402


def main() -> None:
    """Prints the decoder, and on how many devices its training began."""
    _, table = cases.sparse(32, 16, 200, 3)
    source, data = cases.model(table), cases.examples(200, 32, 17)
    aim, schedule = Aim(cases.SITE, 32, BatchTop(3)), Schedule(20, 64)
    centre = cases.centred(source, data)
    fold = training.fold(source, {"own": aim}, centre, schedule, tokens=16 * 17)
    made = run(fold, Epochs(data, 16, 8))["own"].dictionary
    learned = begin(aim, centre, schedule, cases.key(0)).learned
    devices = len(learned["decoder_FxO"].sharding.device_set)
    print(json.dumps({"devices": devices, "decoder": made.decoder_FxO.tolist()}))  # noqa: T201


if __name__ == "__main__":
    main()
