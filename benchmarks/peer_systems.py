"""The systems that benchmarks/peers.py compares, each used as its documentation does.

All read the same files, split to the same number of tokens with a splitter of their own, and embed with the same model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

WINDOW = 256  # tokens that the model reads
CHUNK = WINDOW - 2  # without [CLS] and [SEP], which l2m-rag subtracts by itself
OVERLAP = 32
TOP = 5  # chunks asked for with each question
SUFFIXES = (".txt", ".md")

Search = Callable[[str], Sequence[str]]  # question -> files of the best TOP chunks, best first


@dataclass(slots=True)
class System:
    """A library with its model loaded, used as its documentation does.

    Args:
        dtype: of the model.
        ingest: reads a folder of files into an index that lies in another folder afterwards.
        chunks: gives the texts that were embedded.
        open: opens the index; None when there is none.
        again: ingests the folder a second time; None when the library cannot skip what is unchanged.
        prepare: what `ingest` needs and is not measured.
    """

    dtype: str
    ingest: Callable[[Path, Path], None]
    chunks: Callable[[Path], list[str]]
    open: Callable[[Path], Search] | None = None
    again: Callable[[Path, Path], None] | None = None
    prepare: Callable[[Path], None] | None = None


# -- the systems -------------------------------------------------------------------------------------------------------
def encode(model: Path, threads: int) -> System:
    """SentenceTransformer.encode with its defaults on l2m-rag's chunks: no reading, no splitting, no index."""
    from l2m_rag.indexers.chunking import split
    from l2m_rag.indexers.loaders import load

    encoder = sentence_transformer(model)
    texts: list[str] = []

    def prepare(folder: Path) -> None:
        files = [(path, load(path)) for path in files_below(folder)]
        tokens = Tokens(model)
        texts[:] = [c.text for path, text in files for c in split(text, path.name, tokens, size=CHUNK, overlap=OVERLAP)]

    return System(dtype(encoder), lambda folder, store: encoder.encode(texts), lambda store: texts, prepare=prepare)


def l2m(model: Path, threads: int) -> System:
    """This project, with its defaults."""
    import l2m_rag
    from l2m_rag.config import Settings
    from l2m_rag.indexers.embedding import computes_bf16
    from l2m_rag.memory_tiers.long_term import LongTermTier

    def collection(store: Path) -> Any:
        settings = Settings(home=store, models=model.parent, threads=threads, chunk_size=WINDOW, chunk_overlap=OVERLAP)
        return l2m_rag.open("bench", settings=settings)

    def ingest(folder: Path, store: Path) -> None:
        report = collection(store).ingest(folder)
        if report.failed:
            raise RuntimeError(f"files that l2m-rag could not read: {report.failed}")

    def chunks(store: Path) -> list[str]:
        return LongTermTier(collection(store).path).store.to_arrow()["chunks"]["text"].to_pylist()

    def search(store: Path) -> Search:
        opened = collection(store)
        return lambda question: [passage.chunk.document for passage in opened.search(question, TOP)]

    def again(folder: Path, store: Path) -> None:
        report = collection(store).ingest(folder)
        assert report.added + report.updated == 0, report

    return System("bfloat16" if computes_bf16() else "float32", ingest, chunks, search, again)


def l2m_fp32(model: Path, threads: int) -> System:
    """The same in fp32 where its default is bf16: what the rest of the way costs when the arithmetic is equal."""
    from l2m_rag.indexers import embedding

    mock.patch.object(embedding, "computes_bf16", return_value=False).start()
    return l2m(model, threads)


def langchain(model: Path, threads: int) -> System:
    """DirectoryLoader, RecursiveCharacterTextSplitter that counts with the model's tokenizer, FAISS, index()."""
    from faiss import IndexFlatL2
    from langchain_classic.indexes import SQLRecordManager
    from langchain_community.docstore.in_memory import InMemoryDocstore
    from langchain_community.document_loaders import DirectoryLoader, TextLoader
    from langchain_community.vectorstores import FAISS
    from langchain_core.embeddings import Embeddings
    from langchain_core.indexing import index

    encoder = sentence_transformer(model)
    splitter = recursive_splitter(encoder.tokenizer)

    class LocalEmbeddings(Embeddings):  # the two calls of langchain-huggingface
        def embed_documents(self, texts: list[str]) -> list[list[float]]:
            return encoder.encode(texts).tolist()

        def embed_query(self, text: str) -> list[float]:
            return encoder.encode(text).tolist()

    embeddings = LocalEmbeddings()

    def update(vectors: FAISS, folder: Path, store: Path) -> Any:
        loader = DirectoryLoader(
            str(folder),
            glob=[f"**/*{suffix}" for suffix in SUFFIXES],
            loader_cls=TextLoader,
            loader_kwargs={"encoding": "utf-8"},
        )
        records = SQLRecordManager("bench", db_url=f"sqlite:///{store / 'records.sqlite'}")
        records.create_schema()
        chunks = splitter.split_documents(loader.load())
        # not the default batch of 100, so that `encode` can sort by length
        return index(chunks, records, vectors, batch_size=10_000, cleanup="full", key_encoder="blake2b")

    def ingest(folder: Path, store: Path) -> None:
        vectors = FAISS(embeddings, IndexFlatL2(encoder.get_embedding_dimension()), InMemoryDocstore(), {})
        update(vectors, folder, store)
        vectors.save_local(str(store))

    def load(store: Path) -> FAISS:
        return FAISS.load_local(str(store), embeddings, allow_dangerous_deserialization=True)

    def chunks(store: Path) -> list[str]:
        vectors = load(store)
        return [chunk.page_content for chunk in vectors.get_by_ids(list(vectors.index_to_docstore_id.values()))]

    def search(store: Path) -> Search:
        vectors = load(store)
        return lambda question: [found.metadata["source"] for found in vectors.similarity_search(question, k=TOP)]

    def again(folder: Path, store: Path) -> None:
        report = update(load(store), folder, store)
        assert report["num_added"] + report["num_deleted"] == 0, report

    return System(dtype(encoder), ingest, chunks, search, again)


def llamaindex(model: Path, threads: int) -> System:
    """SimpleDirectoryReader, SentenceSplitter that counts with the model's tokenizer, VectorStoreIndex, persist."""
    from llama_index.core import SimpleDirectoryReader, StorageContext, VectorStoreIndex, load_index_from_storage
    from llama_index.core.embeddings import BaseEmbedding
    from llama_index.core.node_parser import SentenceSplitter

    encoder = sentence_transformer(model)

    class LocalEmbedding(BaseEmbedding):  # the calls of llama-index-embeddings-huggingface
        def _get_text_embeddings(self, texts: list[str]) -> list[list[float]]:
            return encoder.encode(texts).tolist()

        def _get_text_embedding(self, text: str) -> list[float]:
            return encoder.encode(text).tolist()

        def _get_query_embedding(self, query: str) -> list[float]:
            return encoder.encode(query).tolist()

        async def _aget_query_embedding(self, query: str) -> list[float]:
            return self._get_query_embedding(query)

    embedding = LocalEmbedding(embed_batch_size=2048)  # not the default of 10, so that `encode` can sort by length
    splitter = SentenceSplitter(chunk_size=CHUNK, chunk_overlap=OVERLAP, tokenizer=encoder.tokenizer.tokenize)

    def documents(folder: Path) -> list[Any]:
        reader = SimpleDirectoryReader(str(folder), recursive=True, required_exts=list(SUFFIXES), filename_as_id=True)
        found = reader.load_data()
        for document in found:  # by default each chunk is embedded with its path before it, which costs tokens
            document.excluded_embed_metadata_keys.append("file_path")
            document.excluded_llm_metadata_keys.append("file_path")
        return found

    def ingest(folder: Path, store: Path) -> None:
        index = VectorStoreIndex.from_documents(documents(folder), transformations=[splitter], embed_model=embedding)
        index.storage_context.persist(str(store))

    def load(store: Path) -> Any:
        storage = StorageContext.from_defaults(persist_dir=str(store))
        return load_index_from_storage(storage, embed_model=embedding, transformations=[splitter])

    def chunks(store: Path) -> list[str]:
        return [node.get_content(metadata_mode="embed") for node in load(store).docstore.docs.values()]

    def search(store: Path) -> Search:
        retriever = load(store).as_retriever(similarity_top_k=TOP)
        return lambda question: [found.node.metadata["file_path"] for found in retriever.retrieve(question)]

    def again(folder: Path, store: Path) -> None:
        assert not any(load(store).refresh_ref_docs(documents(folder)))

    return System(dtype(encoder), ingest, chunks, search, again)


def txtai(model: Path, threads: int) -> System:
    """Segmentation with its sentence chunker, a hybrid index with content."""
    from transformers import AutoTokenizer
    from txtai import Embeddings
    from txtai.pipeline import Segmentation

    loaded: dict[str, Any] = {}  # so that the model is loaded once
    config = {"path": str(model), "content": True, "hybrid": True}
    network = Embeddings(config, models=loaded).model.model.model
    tokenizer = AutoTokenizer.from_pretrained(str(model))
    splitter = Segmentation(chunker="sentence", tokenizer=tokenizer, chunk_size=CHUNK, chunk_overlap=OVERLAP)

    def ingest(folder: Path, store: Path) -> None:
        index = Embeddings(config, models=loaded)
        index.index(named_chunks(folder, splitter))
        index.save(str(store))
        index.close()

    def load(store: Path) -> Embeddings:
        index = Embeddings(models=loaded)
        index.load(str(store))
        return index

    def chunks(store: Path) -> list[str]:
        return [row["text"] for row in load(store).search("select text from txtai", 10**9)]

    def search(store: Path) -> Search:
        index = load(store)
        return lambda question: [file_of(found["id"]) for found in index.search(question, TOP)]

    return System(dtype(network), ingest, chunks, search)


def chroma(model: Path, threads: int) -> System:
    """A persistent client and its sentence-transformers function; it has no splitter, so LangChain's is used."""
    from chromadb import PersistentClient
    from chromadb.config import Settings
    from chromadb.utils.embedding_functions import SentenceTransformerEmbeddingFunction
    from transformers import AutoTokenizer

    embed = SentenceTransformerEmbeddingFunction(model_name=str(model))
    splitter = recursive_splitter(AutoTokenizer.from_pretrained(str(model)))

    def client(store: Path) -> Any:
        return PersistentClient(path=str(store), settings=Settings(anonymized_telemetry=False))

    def ingest(folder: Path, store: Path) -> None:
        ids, texts = map(list, zip(*named_chunks(folder, splitter.split_text), strict=True))
        with client(store) as writer:  # closed, so that it is really opened again below
            collection = writer.create_collection("bench", embedding_function=embed)
            size = writer.get_max_batch_size()
            for low in range(0, len(ids), size):
                collection.add(ids=ids[low : low + size], documents=texts[low : low + size])

    def chunks(store: Path) -> list[str]:
        with client(store) as reader:
            return reader.get_collection("bench", embedding_function=embed).get()["documents"]

    def search(store: Path) -> Search:
        collection = client(store).get_collection("bench", embedding_function=embed)
        return lambda question: [
            file_of(found) for found in collection.query(query_texts=[question], n_results=TOP)["ids"][0]
        ]

    return System(dtype(embed._model), ingest, chunks, search)


SYSTEMS = {
    "encode": encode,
    "l2m": l2m,
    "l2m-fp32": l2m_fp32,
    "langchain": langchain,
    "llamaindex": llamaindex,
    "txtai": txtai,
    "chroma": chroma,
}


# -- what the systems share --------------------------------------------------------------------------------------------
class Tokens:
    """The model's tokenizer, without special tokens, padding and truncation."""

    def __init__(self, model: Path) -> None:
        from tokenizers import Tokenizer

        self._tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()

    def spans(self, texts: Sequence[str]) -> list[list[tuple[int, int]]]:
        """Give the character span of each token of each text."""
        return [found.offsets for found in self._tokenizer.encode_batch(list(texts), add_special_tokens=False)]


def sentence_transformer(model: Path) -> Any:
    from sentence_transformers import SentenceTransformer

    return SentenceTransformer(str(model))


def dtype(module: Any) -> str:
    return str(next(module.parameters()).dtype).removeprefix("torch.")


def recursive_splitter(tokenizer: Any) -> Any:
    from langchain_text_splitters import RecursiveCharacterTextSplitter as Splitter

    return Splitter.from_huggingface_tokenizer(tokenizer, chunk_size=CHUNK, chunk_overlap=OVERLAP)


def files_below(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.suffix in SUFFIXES and path.is_file())


def named_chunks(folder: Path, split: Callable[[str], list[str]]) -> Iterator[tuple[str, str]]:
    for path in files_below(folder):
        for number, text in enumerate(split(path.read_text(encoding="utf-8"))):
            yield f"{path}#{number}", text


def file_of(chunk: str) -> str:
    return chunk.rpartition("#")[0]
