"""Guided answers to a file of questions, as they finish: `python examples/decode_file.py [FILE [FILE.jsonl]]`.

The file has one question per line. The prompts go through the decoder `AT_ONCE` at a time. One that ends makes room for
the next, so that a long answer holds up none of the short ones. Without a file the questions are some of the bundled
models' world.
"""

import json
import sys
from pathlib import Path

from genarm import GuidedDecoder, bundled, world

AT_ONCE = 8
WEIGHTS = {"helpful": 1.0, "polite": 0.5}


def main(questions: list[str], out: Path | None) -> None:
    decoder = GuidedDecoder.from_pretrained(bundled.path("base"), {name: bundled.path(name) for name in WEIGHTS})
    chats = [[{"role": "user", "content": question}] for question in questions]
    answers = [""] * len(questions)
    for i, result in decoder.generate_each(chats, weights=WEIGHTS, top_p=0.9, seed=0, batch_size=AT_ONCE):
        answers[i] = result.texts[0].strip()
        reward = sum(result.rewards["helpful"][0]) / len(result.tokens[0])
        print(f"{questions[i]}\n  {answers[i]}\n  {len(result.tokens[0])} tokens, helpful {reward:.2f} nats each")
    if out:
        rows = zip(questions, answers, strict=True)
        out.write_text("".join(json.dumps({"question": q, "answer": a}) + "\n" for q, a in rows))


if __name__ == "__main__":
    lines = Path(sys.argv[1]).read_text().splitlines() if len(sys.argv) > 1 else world.sample_prompts(12, seed=5)
    main([line for line in lines if line.strip()], Path(sys.argv[2]) if len(sys.argv) > 2 else None)
