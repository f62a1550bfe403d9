"""What several test files use: models that need no download, and a home with collections."""

import hashlib
import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

from l2m_rag import models, weights
from l2m_rag.config import Settings, load_settings

Vectors = np.ndarray[tuple[int, int], np.dtype[np.float32]]


class HashingEmbedder:
    """Adds up a random vector for each word: texts that share words are close. It keeps what it was given."""

    name = "hashing"
    fingerprint = "0123456789abcdef"
    dimension = 32
    max_tokens = 1_000_000

    def __init__(self) -> None:
        self.encoded: list[str] = []

    def spans(self, texts: Sequence[str]) -> list[list[tuple[int, int]]]:
        return [[match.span() for match in re.finditer(r"\w+|[^\w\s]", text)] for text in texts]

    def encode(self, texts: Sequence[str], *, progress: Callable[[int], None] | None = None) -> Vectors:
        self.encoded += texts
        vectors = np.zeros((len(texts), self.dimension), dtype=np.float32)
        for row, text in enumerate(texts):
            for word in re.findall(r"\w+", text.lower()):
                seed = hashlib.sha256(word.encode("utf-8", "surrogatepass")).digest()
                vectors[row] += np.frombuffer(seed, dtype=np.uint8).astype(np.float32) - 127.5
            vectors[row] /= np.linalg.norm(vectors[row]) or 1.0
            if progress:
                progress(row + 1)
        return vectors


@pytest.fixture
def hashing() -> HashingEmbedder:
    return HashingEmbedder()


@pytest.fixture
def by_hashing(hashing: HashingEmbedder, monkeypatch: pytest.MonkeyPatch) -> HashingEmbedder:
    """It is the embedder of every collection, whatever the settings name."""
    monkeypatch.setattr(models, "_load_embedder", lambda *_: hashing)
    return hashing


@pytest.fixture(scope="session")
def default_weights() -> None:
    """Skips what needs the models that are downloaded."""
    found = load_settings()[0]
    if any(weights.verify(name, found).state != "present" for name in weights.PACKAGES):
        pytest.skip("the default weights are not here; run: l2m models pull")


@pytest.fixture(scope="session")
def embedder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sentence-transformers model of one layer and no training: enough for everything but good answers."""
    import torch
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, Transformer
    from tokenizers import Tokenizer, normalizers, pre_tokenizers, processors
    from tokenizers.models import WordPiece
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    letters = [chr(code) for code in range(33, 127)]
    vocabulary = {token: i for i, token in enumerate([*special, *letters, *(f"##{letter}" for letter in letters)])}
    words = Tokenizer(WordPiece(vocabulary, unk_token="[UNK]"))
    words.normalizer = normalizers.BertNormalizer()
    words.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    words.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    folder = tmp_path_factory.mktemp("embedder")
    names = dict(zip(("pad_token", "unk_token", "cls_token", "sep_token", "mask_token"), special, strict=True))
    PreTrainedTokenizerFast(tokenizer_object=words, model_max_length=128, **names).save_pretrained(folder / "bert")
    torch.manual_seed(0)
    size = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    config = BertConfig(vocab_size=len(vocabulary), max_position_embeddings=128, **size)
    BertModel(config).save_pretrained(folder / "bert")
    modules = [Transformer(str(folder / "bert")), Pooling(32), Normalize()]
    SentenceTransformer(modules=modules, device="cpu").save(str(folder / "whole"))
    return folder / "whole"


@pytest.fixture(scope="session")
def language_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of two layers and no training."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("language-model")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<|end|>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(["the lease ends and the rent is paid"] * 20, trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    kind = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|end|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(kind))
    torch.manual_seed(0)
    size = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "max_position_embeddings": 2048}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    config = LlamaConfig(vocab_size=tokenizer.get_vocab_size(), eos_token_id=0, **size, **heads)
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def served(tmp_path_factory: pytest.TempPathFactory, embedder: Path, language_model: Path) -> Settings:
    """Settings of a home with the collections `contracts` and `letters`, and a damaged one, that answer anything."""
    import l2m_rag.collection

    folder = tmp_path_factory.mktemp("served")
    settings = Settings(
        home=folder / "home",
        collection="contracts",
        embedder=str(embedder),
        model=str(language_model),
        chunk_size=32,
        chunk_overlap=8,
        budget=256,
        abstain_below=0.0,
    )
    lease = folder / "lease.txt"
    lease.write_text("The lease ends on 30 April 2029.\n\nThe rent is 900 euros. It's due on the first.\n\n" * 5)
    (folder / "evil.md").write_text(
        "# Hello\n\n<img src=x onerror=alert(1)> <script>alert(2)</script> pays the rent.\n"
    )
    l2m_rag.collection.open("contracts", settings=settings).ingest(lease, folder / "evil.md")
    l2m_rag.collection.open("letters", settings=settings).ingest(lease)
    (folder / "home" / "collections" / "broken").mkdir()
    (folder / "home" / "collections" / "broken" / "manifest.json").write_text("{")
    return settings
