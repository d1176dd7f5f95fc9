"""Fine-tune a model: ``python train.py config.yaml [key=value ...]``, the same as ``fuselora train``.

Top to bottom this is the whole product: configuration -> data -> model -> patch_model -> fit -> result. The keys are
in docs/config.md; ``python train.py --help`` lists them. torch and transformers take seconds to import, so what reads
and checks the keys comes before them: a misspelt one is said at once.
"""

from __future__ import annotations

import os
import sys
from contextlib import nullcontext
from typing import Any

from fuselora.engine.base_name import check_names
from fuselora.engine.config import Config, read_config
from fuselora.engine.config_docs import config_help
from fuselora.engine.config_files import check_files
from fuselora.engine.errors import UserError, run_command


def train(config: Config) -> int:
    """One run, alone or as one of several processes. Returns the exit code: 0, or 128 + signal if a signal stopped it
    after a checkpoint.
    """
    from fuselora.engine.quiet import quiet_libraries  # noqa: I001 - first, for what is said during imports

    import torch

    from fuselora.engine import distributed, output
    from fuselora.engine.data import check_sources, first_example, load_data
    from fuselora.engine.isolation import check_apart
    from fuselora.engine.loop_evaluate import said
    from fuselora.engine.memory_run import announce
    from fuselora.engine.model import check_vocabulary, load_tokenizer, resolve_base
    from fuselora.engine.monitors import Reporting, monitors_of
    from fuselora.engine.predict import check_libraries, predict
    from fuselora.engine.trainer import Trainer

    quiet_libraries()
    output.check_output_dir(config)
    if config.do_predict:
        check_libraries()
    reporting = Reporting(monitors_of(config), config)
    world = distributed.start(config)
    if config.trust_remote_code:
        print(f"trust_remote_code: true: Python code that comes with {config.model_name_or_path} is run")
    if config.cpu_threads:
        torch.set_num_threads(config.cpu_threads)
    check_sources(config)
    with distributed.main_first(world):  # what it downloads, builds or tokenises the others find
        base = resolve_base(config)
        tokenizer = load_tokenizer(base, config)
        data = load_data(config, tokenizer)
    print(data.report, first_example(data, tokenizer), sep="\n")

    print(announce(config))
    model = _build(base, config)
    check_vocabulary(model, data.largest)
    check_apart(model, config, tokenizer.pad_token_id)

    trainer = Trainer(
        model, data.train, data.held_out, config, pad_id=tokenizer.pad_token_id, world=world, callbacks=[reporting]
    )
    if config.packed and trainer.data.units is not None:
        print(trainer.data.units.report)
    if config.do_train:
        stopped_by = _fit(trainer, reporting, tokenizer, base, data.shown)
        if stopped_by:
            return 128 + stopped_by
    else:
        print(said(trainer.evaluate()))
    if config.do_predict:
        predict(model, tokenizer, data, config, world)
    distributed.stop(world)
    return 0


def _fit(trainer: Any, reporting: Any, tokenizer: Any, base: str, shown: Any) -> int:
    """Train and write the result. Returns 0, or the number of the signal that stopped the run after a checkpoint."""
    from fuselora.engine import distributed, output
    from fuselora.engine.checkpoint_weights import result_state

    config, world = trainer.config, trainer.world
    print(trainer.data.plan(trainer.total_steps, world.size))
    trainer.resume()
    with output.opened_output_dir(config, resumed=trainer.resumed) if world.main else nullcontext():
        with reporting.running(trainer):
            stopped_by = trainer.fit()
    if stopped_by:
        print(f"stopped; go on with the same command and resume_from_checkpoint={trainer.last_checkpoint}")
        return stopped_by
    weights = result_state(trainer.model)
    if not config.do_predict:  # else the others wait, to predict their share
        distributed.stop(world)
    if world.main:
        output.write_run(trainer.model, tokenizer, config, weights, base, shown=shown, records=trainer.log.records)
    return 0


def _build(base: str, config: Config) -> Any:
    from fuselora.engine.heap import keep_freed_memory
    from fuselora.engine.methods import trainable_summary
    from fuselora.engine.model import build_model, pick_device

    if config.memory_budget_gb is not None:
        keep_freed_memory(pick_device(config), budgeted=True)  # loading has its heap too
    model = build_model(base, config)
    print(trainable_summary(model))
    if config.fuse:
        _fuse(model, config)
    return model


def _fuse(model: Any, config: Config) -> None:
    from fuselora.engine.memory_run import apply_checkpointing
    from fuselora.engine.patch import patch_model, patch_report

    try:
        patch_model(model, strict=config.fuse_strict, dequant_cache_gb=config.dequant_cache_gb)
    except ValueError as error:  # strict, and something can't be fused
        raise UserError(str(error)) from error
    print(patch_report(model))
    print(apply_checkpointing(model, config))


def main(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help"):
        print(config_help())
        return 0
    return run_command(lambda: _read_and_train(arguments))


def _read_and_train(arguments: list[str]) -> int:
    config, sorting = read_config(arguments)
    check_names(config)
    check_files(config)
    from fuselora.engine.distributed import relaunch

    relaunch(arguments)
    if os.environ.get("RANK", "0") == "0":
        print(sorting)
    return train(config)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
