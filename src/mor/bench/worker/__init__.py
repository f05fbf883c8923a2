"""Runs one peer in a Python of its own, and does what its standard input says, line by line.

    <environment>/bin/python worker openvino

Standard library only, apart from the peer itself: this folder runs where ``mor`` is not
installed, so its files import each other relatively.
Each line of standard input is a JSON object with ``do``, each is answered by one line:

    {"do": "load", "folder": ..., "variant": ..., "max_num_seqs": n, "max_model_len": n,
     "threads": n, "cache": ...}
        -> {"ok": true, "versions": {...}, "details": {...}}
    {"do": "run", "requests": [{"prompt": [ids], "new_tokens": n}, ...], "concurrency": n}
        -> {"ok": true, "began": t, "ended": t, "traces": [{"sent": t, "times": [t...],
            "tokens": [ids]}, ...]}
    anything that goes wrong -> {"ok": false, "error": "..."}

Times are seconds on a clock of this process. Load is closed: ``concurrency`` clients, each of which
sends its next request when it has the whole answer to its last. Greedy, and exactly ``new_tokens``
new tokens.
"""
