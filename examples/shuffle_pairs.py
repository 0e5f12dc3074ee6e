"""The control of examples/xsid.yaml: pairs whose translations are dealt out anew within each language.

python examples/shuffle_pairs.py OUT.jsonl FILE [FILE ...]
then: fastalign train examples/xsid.yaml alignment.data=OUT.jsonl ...
A run on them must not raise retrieval; one that does is learning something other than meaning.
"""

import json
import random
import sys
from collections import defaultdict

from fastalign.data.parallel import read_pairs

out, *files = sys.argv[1:]
groups = defaultdict(list)
for pair in read_pairs(files, "to_english", "FILE"):
    groups[pair.source_lang].append(pair)
draw = random.Random(0)
with open(out, "w", encoding="utf-8") as lines:
    for language, pairs in groups.items():
        targets = [pair.target for pair in pairs]
        draw.shuffle(targets)
        for pair, target in zip(pairs, targets, strict=True):
            row = {"source": pair.source, "target": target, "source_lang": language, "target_lang": pair.target_lang}
            lines.write(json.dumps(row, ensure_ascii=False) + "\n")
