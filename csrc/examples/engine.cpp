// A decoding engine in C++ to copy from: two bigram models in place of a base model and an ARM, no Python anywhere.
// Its options stand in toy.h.
#include <memory>
#include <vector>

#include "genarm_kernels.h"
#include "toy.h"

int main(int argc, char** argv) {
  const Options o = parse(argc, argv);
  // The header this was compiled with and the library that was loaded must agree on the structs.
  if (genarm_abi_version() != GENARM_ABI_VERSION) fail(1, "genarm_kernels", "library and header differ in ABI version");
  genarm_error error;

  genarm_thread_pool* raw_pool = nullptr;  // an engine with threads of its own fills a genarm_executor with them
  if (genarm_thread_pool_create(static_cast<int>(o.threads), &raw_pool, &error)) fail(1, "threads", error.message);
  const std::unique_ptr<genarm_thread_pool, void (*)(genarm_thread_pool*)> pool(raw_pool, genarm_thread_pool_destroy);

  const Bigram base(0, o.vocab), arm(1, o.vocab);
  const auto batch = static_cast<size_t>(o.sequences), vocab = static_cast<size_t>(o.vocab);
  std::vector<float> base_logits(batch * vocab), arm_logits(batch * vocab);
  const genarm_logits logits[] = {{base_logits.data(), o.vocab}, {arm_logits.data(), o.vocab}};
  std::vector<int64_t> token(batch, 0);  // every sequence begins after token 0
  std::vector<int32_t> kept(batch), status(batch);
  std::vector<std::vector<int64_t>> sequences(batch);
  const float base_weight = 1;
  int64_t position = 0;

  genarm_guided_step_args args{};  // zero first: what is not named below is off or neutral
  args.in.struct_size = sizeof args;
  args.in.dtype = GENARM_FLOAT32;
  args.in.rows = o.sequences;
  args.in.vocab_size = o.vocab;
  args.in.arms = 1;
  args.in.logits = logits;
  args.in.base_weight = {&base_weight, 0};  // stride 0: the same for every row
  args.in.weights = &o.weight;
  args.in.temperature = {&o.temperature, 0};
  args.in.executor = genarm_thread_pool_executor(pool.get());
  args.top_k = {&o.top_k, 0};
  args.top_p = {&o.top_p, 0};
  args.min_p = {&o.min_p, 0};
  args.seed = {&o.seed, 0};
  args.seed_step = GENARM_SEED_STEP;
  args.position = {&position, 0};
  args.token = token.data();  // the next step's last tokens at once
  args.kept = kept.data();
  args.status = status.data();

  size_t bytes = 0;  // once for all steps: then no step allocates
  if (genarm_guided_step_workspace(&args, &bytes, &error)) fail(1, "workspace", error.message);
  std::vector<unsigned char> workspace(bytes);
  args.in.workspace = workspace.data();
  args.in.workspace_size = bytes;

  for (; position < o.tokens; ++position) {
    base.forward(token, base_logits.data());
    arm.forward(token, arm_logits.data());
    if (genarm_guided_step(&args, &error)) fail(1, "guided_step", error.message);
    for (size_t b = 0; b < batch; ++b) {
      if (status[b] != GENARM_DRAWN) fail(1, "guided_step", "a row's logits are not finite: is --weight too large?");
      sequences[b].push_back(token[b]);
    }
  }
  print(sequences);
  return 0;
}
