"""The ``fuselora`` command: thin; every verb calls what a program could import.

fuselora train [config.yaml] [key=value ...]     train.py
fuselora verify [config.yaml] [key=value ...]    patched against stock against fp64 on the configured model
fuselora estimate [config.yaml] [key=value ...]  memory by part and checkpointing policy; with memory_budget_gb=N the
                                                 longest context within N GB
fuselora export [config.yaml] [key=value ...]    adapters merged into the base: a model folder, GGUF if asked
fuselora chat [config.yaml] [key=value ...]      a conversation on the terminal; also from a script on standard input
fuselora bench [step|ops|all|methods|gate|report|predict]
                                                 bench/, in a clone: a training step by default
fuselora merge model_name_or_path=... adapter_name_or_path=... export_dir=... [requantize=true]
                                                 LoRA into a 4-bit base: a dense model, or 4 bits again, and the drift
fuselora env                                     environment and capability report
fuselora config-docs                             docs/config.md on standard output
"""

from __future__ import annotations

import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fuselora.engine.errors import UserError, expected, run_command
from fuselora.engine.quiet import quiet_libraries


def _train(arguments: list[str]) -> int:
    from fuselora import train

    return train.main(arguments)


def _read(arguments: list[str], kind: type[Any] | None = None) -> tuple[Any, Any]:
    """Configuration and sorting, before torch is imported, which takes seconds. ``kind``: as in ``read_config``."""
    from fuselora.engine.base_name import check_names
    from fuselora.engine.config import Config, read_config

    config, sorting = read_config(arguments, kind or Config)
    check_names(config)
    return config, sorting


def _verify(arguments: list[str]) -> int:
    """Exit code 1 if the patched model isn't as close to the fp64 truth as the stock one."""
    config, _ = _read(arguments)
    import torch

    from fuselora.engine.chat import collate
    from fuselora.engine.data import load_data
    from fuselora.engine.model import build_model, load_tokenizer, resolve_base
    from fuselora.engine.patch import patch_model
    from fuselora.engine.verify import verify

    quiet_libraries()
    base = resolve_base(config)
    tokenizer = load_tokenizer(base, config)
    model = build_model(base, config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:  # zero at the start of training, which would make every gradient of A zero
                parameter.normal_(std=0.02)
    examples = load_data(config, tokenizer).train[: config.per_device_train_batch_size]
    batch = collate(examples, tokenizer.pad_token_id)
    device = next(model.parameters()).device
    result = verify(patch_model(model), {name: tensor.to(device) for name, tensor in batch.items()})
    print(result)
    return 0 if result.ok else 1


BENCHES = {"step": "train_step", "ops": "op_times", "gate": "gate", "report": "write_report", "predict": "predict"}
BENCHES |= {"all": "bench_all", "methods": "methods"}


def _export(arguments: list[str]) -> int:
    """Exit code 1 if the exported model's logits are not those of base and adapter."""
    from fuselora.engine.config_docs import command_help
    from fuselora.engine.config_export import ExportConfig

    if arguments[:1] in (["-h"], ["--help"]):
        print(command_help(ExportConfig))
        return 0
    config, sorting = _read(arguments, ExportConfig)
    from fuselora.engine.export import export

    quiet_libraries()
    print(sorting)
    parity = export(config)
    print(f"wrote {', '.join(sorted(p.name for p in Path(config.export_dir).iterdir()))} to {config.export_dir}")
    print(parity)
    return 0 if parity.ok else 1


def _estimate(arguments: list[str]) -> int:
    config, _ = _read(arguments)
    from fuselora.engine.memory_run import estimate

    quiet_libraries()
    print(estimate(config))
    return 0


def _chat(arguments: list[str]) -> int:
    from fuselora.engine.config_docs import command_help
    from fuselora.engine.config_export import ChatConfig

    if arguments[:1] in (["-h"], ["--help"]):
        print(command_help(ChatConfig))
        return 0
    config, _ = _read(arguments, ChatConfig)
    from fuselora.engine.chat_cli import chat

    quiet_libraries()
    return chat(config)


def _bench(arguments: list[str]) -> int:
    """`fuselora bench NAME ...` for a name in BENCHES; without one, a training step."""
    named = bool(arguments) and arguments[0] in BENCHES
    script = BENCHES[arguments[0] if named else "step"]
    path = Path(__file__).resolve().parents[2] / "bench" / f"{script}.py"
    if not path.is_file():
        raise UserError(
            "bench: expected a clone of the repository, got an installed package; clone it and run it there"
        )
    sys.argv = [str(path), *arguments[named:]]
    sys.path.insert(0, str(path.parent))
    runpy.run_path(str(path), run_name="__main__")
    return 0


def _merge(arguments: list[str]) -> int:
    """Keys are ``merge_folder``'s arguments."""
    import inspect

    import yaml

    from fuselora.engine.merge import merge_folder

    quiet_libraries()
    known = inspect.signature(merge_folder).parameters
    values: dict[str, Any] = {}
    for argument in arguments:
        key, equals, text = argument.removeprefix("--").partition("=")
        if not equals or key not in known:
            raise expected(
                "merge", f"key=value with a key of {', '.join(known)}", repr(argument), "see fuselora --help"
            )
        values[key] = text if known[key].annotation == "str" else yaml.safe_load(text)
        if known[key].annotation == "bool" and not isinstance(values[key], bool):
            raise expected(key, "true or false", repr(text), "choose one of those")
    for key, parameter in known.items():
        if parameter.default is parameter.empty and key not in values:
            raise expected(key, "a folder or hub id", "nothing", f"add {key}=...")
    merge_folder(**values)
    print(f"wrote {values['export_dir']}")
    return 0


def _env(arguments: list[str]) -> int:
    import fuselora

    print(fuselora.env())
    return 0


def _config_docs(arguments: list[str]) -> int:
    from fuselora.engine.config_docs import config_markdown

    print(config_markdown(), end="")
    return 0


COMMANDS: dict[str, Callable[[list[str]], int]] = {
    "train": _train,
    "verify": _verify,
    "export": _export,
    "chat": _chat,
    "estimate": _estimate,
    "bench": _bench,
    "merge": _merge,
    "env": _env,
    "config-docs": _config_docs,
}


WITH_HELP = ("train", "export", "chat", "bench")  # of their own


def usage() -> str:
    from fuselora.engine.config_docs import config_help

    assert __doc__ is not None
    return f"{__doc__}\nkeys of train and verify, with their defaults:\n\n{config_help()}"


def _dispatch(arguments: list[str]) -> int:
    command = COMMANDS.get(arguments[0])
    if command is None:
        raise UserError(f"command: expected one of {', '.join(COMMANDS)}, got {arguments[0]!r}; see fuselora --help")
    if arguments[1:2] in (["-h"], ["--help"]) and arguments[0] not in WITH_HELP:
        print(usage())
        return 0
    return command(arguments[1:])


def main(arguments: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    if not arguments or arguments[0] in ("-h", "--help"):
        print(usage())
        return 0
    return run_command(lambda: _dispatch(arguments))


if __name__ == "__main__":
    sys.exit(main())
