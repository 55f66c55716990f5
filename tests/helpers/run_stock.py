"""Greedy text and a hash of all logits from llama_cpp alone, for the law that off is bit-equal.

usage: run_stock.py LIB_DIR MODEL
"""

import hashlib
import os
import sys

os.environ["LLAMA_CPP_LIB_PATH"] = sys.argv[1]
import llama_cpp
import numpy as np

llm = llama_cpp.Llama(
    sys.argv[2], n_ctx=1024, n_threads=2, n_threads_batch=2, flash_attn=True, verbose=False, logits_all=True
)
llm.eval(llm.tokenize(b"The lighthouse keeper wrote in his book every evening:"))
for _ in range(40):
    llm.eval([int(np.argmax(llm.scores[llm.n_tokens - 1]))])
print(
    hashlib.sha256(np.ascontiguousarray(llm.scores[: llm.n_tokens])).hexdigest(), llm.input_ids[: llm.n_tokens].tolist()
)
