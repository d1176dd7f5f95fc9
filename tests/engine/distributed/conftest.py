"""Runs of several processes on this machine, over gloo: forked, so that each starts in milliseconds."""

import json
import multiprocessing
import os
import socket
import sys
import time
import traceback

import pytest
import torch

from fuselora.engine import distributed
from fuselora.engine.data import load_data
from fuselora.engine.errors import run_command
from fuselora.engine.memory_run import apply_checkpointing
from fuselora.engine.model import build_model
from fuselora.engine.output import open_output_dir
from fuselora.engine.patch import patch_model, patch_report
from fuselora.engine.trainer import Trainer


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@pytest.fixture
def launch(tmp_path):
    """launch(size, run) forks ``size`` processes that call run(rank); returns exit codes, seconds, their errors."""

    def launch(size, run, limit=60):
        context, port = multiprocessing.get_context("fork"), free_port()

        def child(rank):
            os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size)}
            os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
            sys.stderr = open(tmp_path / f"stderr{rank}", "w", buffering=1)
            torch.set_num_threads(1)
            try:
                os._exit(run_command(lambda: run(rank) or 0))
            except BaseException:
                traceback.print_exc()
                os._exit(1)

        processes = [context.Process(target=child, args=(rank,)) for rank in range(size)]
        began = time.monotonic()
        for process in processes:
            process.start()
        for process in processes:
            process.join(max(1, limit - (time.monotonic() - began)))
        seconds = time.monotonic() - began
        hung = [process for process in processes if process.is_alive()]
        for process in hung:
            process.kill()
        assert not hung, "a process hangs"
        errors = [(tmp_path / f"stderr{rank}").read_text() for rank in range(size)]
        return [process.exitcode for process in processes], seconds, errors

    return launch


@pytest.fixture
def run(make_config, tiny_base, tokenizer, launch, tmp_path):
    """run(size, **keys) trains in ``size`` processes, ``stop`` steps or all; returns (log records, trained weights) of
    the main one. On a patched model only modules whose name ends with ``declined`` may run stock. ``look`` sees the
    trainer after it was built and after its end.
    """

    def run(size, name="run", patch=False, stop=None, declined=None, look=lambda trainer: None, **keys):
        config = make_config(output_dir=str(tmp_path / name), logging_steps=1, **keys)
        data = load_data(config, tokenizer)

        def one(rank):
            world = distributed.start(config)
            model = build_model(str(tiny_base), config)
            if patch:
                patch_model(model)
                print(apply_checkpointing(model, config))
            trainer = Trainer(model, data.train, data.held_out, config, pad_id=tokenizer.pad_token_id, world=world)
            trainer.total_steps = stop or trainer.total_steps  # the schedule stays that of all steps
            look(trainer)
            trainer.resume()
            if world.main:
                open_output_dir(config, resumed=trainer.resumed)
            trainer.fit()
            look(trainer)
            stock = [row.module for row in patch_report(model).rows if row.calls_declined] if patch else []
            assert all(declined and name.endswith(declined) for name in stock), str(patch_report(model))
            trained = {n: distributed.whole(p) for n, p in model.named_parameters() if p.requires_grad}
            if world.main:
                torch.save(trained, tmp_path / f"{name}.pt")
                (tmp_path / f"{name}.json").write_text(json.dumps(trainer.log.records))
            distributed.stop(world)

        codes, _, errors = launch(size, one)
        assert codes == [0] * size, errors
        return json.loads((tmp_path / f"{name}.json").read_text()), torch.load(tmp_path / f"{name}.pt")

    return run
