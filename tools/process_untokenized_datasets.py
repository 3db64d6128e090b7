#!/usr/bin/env python
"""Tokenize a config's text (Alpaca, ShareGPT, messages, ...) ahead of training: `llava-tune prepare --modified-config`.

python tools/process_untokenized_datasets.py CFG --save-folder DIR [--num-proc N] [--shard I/N] [any field of the config]

Train from the result with the <config>_modified.py that it writes, or with --dataset.offline-processed-text-folder DIR.
"""

import sys

from llava_tune.cli.main import main

if __name__ == "__main__":
    sys.argv[1:1] = ["prepare"]
    sys.argv.append("--modified-config")
    main()
