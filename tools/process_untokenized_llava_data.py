#!/usr/bin/env python
"""Tokenize a config's conversations ahead of training; the same as `llava-tune prepare`.

python tools/process_untokenized_llava_data.py CFG --save-folder DIR [--dataset.num-proc N] [any field of the config]

Train from the result with --dataset.offline-processed-text-folder DIR.
"""

import sys

from llava_tune.cli.main import main

if __name__ == "__main__":
    sys.argv[1:1] = ["prepare"]
    main()
