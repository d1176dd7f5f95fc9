"""SentencePiece's tokenizers in GGUF files, read back as llama.cpp reads them."""

import json
from pathlib import Path

import pytest
from tests.support.models import base_model
from transformers import AutoTokenizer

from fuselora.engine.config_export import ExportConfig
from fuselora.engine.export import export

SENTENCES = [f"Join {i} path components, inserting '/' as needed; see § {i % 7} of the manual." for i in range(200)]
TEXTS = ["Join 3 paths", "components inserting manual manual", "a  b\nc", "日本 § 4 ü", "x", "needed as 77"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A base whose tokenizer is a trained SentencePiece model, as Llama 2 has one."""
    spm = pytest.importorskip("sentencepiece")
    pytest.importorskip("google.protobuf")  # with which transformers reads it
    folder = tmp_path_factory.mktemp("sentencepiece")
    text = folder / "text.txt"
    text.write_text("\n".join(SENTENCES))
    spm.SentencePieceTrainer.train(
        input=str(text),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=380,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    names = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(names | {"add_bos_token": True}))
    base_model("llama", vocab_size=384).save_pretrained(folder)  # four rows more than tokens
    return folder


@pytest.fixture(scope="module")
def fields(folder, tmp_path_factory):
    pytest.importorskip("gguf")
    from gguf import GGUFReader

    merged = tmp_path_factory.mktemp("merged") / "out"
    assert export(ExportConfig(model_name_or_path=str(folder), export_dir=str(merged), export_gguf="f16")).ok
    prefix = "tokenizer.ggml."
    entries = GGUFReader(merged / "model.gguf").fields.items()
    return {name.removeprefix(prefix): field.contents() for name, field in entries if name.startswith(prefix)}


def llama_cpp(text, fields):
    """Its SentencePiece tokenizer: the neighbours whose union has the highest score are joined, the leftmost first."""
    scores = dict(zip(fields["tokens"], fields["scores"], strict=True))
    ids = {token: i for i, token in enumerate(fields["tokens"])}
    parts = list((" " * fields["add_space_prefix"] + text).replace(" ", "\u2581"))
    while True:
        unions = [(scores.get(a + b), -i) for i, (a, b) in enumerate(zip(parts, parts[1:], strict=False))]
        best = max((union for union in unions if union[0] is not None), default=None)
        if best is None:
            break
        at = -best[1]
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    found = [[ids[p]] if p in ids else [ids[f"<0x{b:02X}>"] for b in p.encode()] for p in parts]
    return [fields["bos_token_id"]] * fields["add_bos_token"] + [i for group in found for i in group]


@pytest.mark.parametrize("text", TEXTS)
def test_tokens_are_those_of_the_tokenizer(folder, fields, text):
    assert llama_cpp(text, fields) == AutoTokenizer.from_pretrained(folder)(text)["input_ids"]


def test_scores_order_pieces_as_sentencepiece_does(folder, fields):
    import sentencepiece

    original = sentencepiece.SentencePieceProcessor(model_file=str(Path(folder) / "tokenizer.model"))
    tokens = [original.id_to_piece(i) for i in range(len(original))]
    assert fields["tokens"] == [*tokens, "[PAD380]", "[PAD381]", "[PAD382]", "[PAD383]"]
    made = [i for i in range(259, 380) if len(tokens[i]) > 1]
    assert len(made) > 50
    assert sorted(made, key=lambda i: -fields["scores"][i]) == sorted(made, key=lambda i: -original.get_score(i))


def test_kinds_of_tokens(fields):
    from gguf import TokenType

    kinds = [TokenType(kind).name for kind in fields["token_type"]]
    assert kinds[:4] == ["UNKNOWN", "CONTROL", "CONTROL", "BYTE"] and kinds[259] == "NORMAL" and kinds[-1] == "UNUSED"
    assert kinds.count("BYTE") == 256 and fields["model"] == "llama" and fields["add_bos_token"]
