"""Files as LLaMA-Factory's users have them: each is read and its data tokenised, or refused by the key named here."""

from pathlib import Path

import pytest

from fuselora.engine.chat import Example, sequences
from fuselora.engine.config import read_config
from fuselora.engine.data import first_example, load_data
from fuselora.engine.data_stream import Stream
from fuselora.engine.errors import UserError

FOLDER = Path(__file__).parent / "configs"
FILES = sorted(path.name for path in FOLDER.glob("*.yaml"))
REFUSED = {
    "dpo.yaml": "stage",
    "kto.yaml": "stage",
    "reward.yaml": "stage",
    "ppo.yaml": "reward_model",
    "galore.yaml": "use_galore",
    "mixture_of_depths.yaml": "mixture_of_depths",
}
TOOLS = "{% if tools %}{{ tools | tojson }}{% endif %}"
TEMPLATE = TOOLS + (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] }}"
    "{% if m['tool_calls'] %}{{ m['tool_calls'] | tojson }}{% endif %}{{ '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def read(name, tmp_path):
    overrides = [f"dataset_dir={FOLDER / 'data'}", f"output_dir={tmp_path / 'out'}", f"tokenized_path={tmp_path}"]
    return read_config([str(FOLDER / name), *overrides])


@pytest.mark.parametrize("name", [name for name in FILES if name not in REFUSED])
def test_accepted(name, tokenizer, tmp_path):
    config, sorting = read(name, tmp_path)
    keys = {line.split(":")[0] for line in (FOLDER / name).read_text().splitlines() if line[:1].isalpha()}
    said = {*sorting.used, *(text.split()[0] for text in sorting.translated), *(key for key, _ in sorting.harmless)}
    assert keys <= said
    tokenizer.chat_template = TEMPLATE
    data = load_data(config, tokenizer)
    assert isinstance(data.train, Stream) == config.streaming
    examples = list(data.train)
    assert examples and all(isinstance(example, Example) and example.trained for example in examples)
    assert max(len(sequence.input_ids) for example in examples for sequence in sequences(example)) <= config.cutoff_len
    assert bool(data.held_out) == (config.val_size > 0)
    assert "⟦" in first_example(data, tokenizer)


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_refused(name, tmp_path):
    with pytest.raises(UserError, match=f"^{REFUSED[name]}: expected ") as caught:
        read(name, tmp_path)
    assert "\n" not in str(caught.value)


def test_first_example_marks_what_is_trained(tokenizer, tmp_path):
    config, _ = read("qlora_sft.yaml", tmp_path)
    tokenizer.chat_template = TEMPLATE
    text = first_example(load_data(config, tokenizer), tokenizer)
    lines = text.splitlines()
    assert lines[1] == (
        "<|user|>Join 1.<|end|><|assistant|>path one<|end|><|user|>Join 0.<|end|><|assistant|>⟦path two<|end|>⟧"
    )
