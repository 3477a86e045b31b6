"""A trade-off turned while the text streams: `python examples/live_tradeoff.py`.

Each turn begins with other weights and mirrors them after every sentence, as if a slider were moved to its other end.
What has been written stays, and the next token is drawn with the new weights.
"""

from genarm import GuidedDecoder, bundled

QUESTION = [{"role": "user", "content": "I want to save money. What should I do?"}]
TURNS = 4


def main() -> None:
    arms = {name: bundled.path(name) for name in ("helpful", "polite")}
    decoder = GuidedDecoder.from_pretrained(bundled.path("base"), arms)
    for turn in range(TURNS):
        share = turn / (TURNS - 1)
        weights = {"helpful": 2 * (1 - share), "polite": 2 * share}
        print(f"\nhelpful {weights['helpful']:.1f}, polite {weights['polite']:.1f}:", end="")
        stream = decoder.stream(messages=QUESTION, weights=weights, seed=7)
        for event in stream:
            print(event.text, end="", flush=True)
            if event.text.endswith("."):  # the slider moves to the other end
                weights = {name: 2.0 - weight for name, weight in weights.items()}
                stream.set_weights(weights)
                print(f" [helpful {weights['helpful']:.1f}, polite {weights['polite']:.1f}]", end="")
    print()


if __name__ == "__main__":
    main()
