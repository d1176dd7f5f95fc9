"""Files that keys name, looked for and read before torch is imported, so that a wrong path is said at once."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fuselora.engine import zero_config
from fuselora.engine.base_name import QUICKSTART
from fuselora.engine.chat_templates import template_file
from fuselora.engine.config_types import json_mapping
from fuselora.engine.data_formats import check_stage
from fuselora.engine.data_info import dataset_info

if TYPE_CHECKING:
    from fuselora.engine.config import Config


def check_files(config: Config) -> None:
    """Raise ``UserError`` for a set, template or configuration file that can't be used. Sets of a remote index wait."""
    if not config.dataset_dir.startswith("REMOTE:"):
        for name in dict.fromkeys((*config.dataset, *config.eval_dataset)):
            if name != QUICKSTART:
                check_stage(dataset_info(name, config.dataset_dir), config.stage)
    if config.template is not None:
        template_file(config.template)
    zero_config.read(config)
    if config.fsdp:
        json_mapping("fsdp_config", config.fsdp_config)
