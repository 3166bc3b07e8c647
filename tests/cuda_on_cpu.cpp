// Runs the kernels of csrc/cuda/pack_kernels.cuh and prune_kernel.cuh on the CPU, a thread for every
// CUDA thread, so that their arithmetic is tested where there is no GPU. Blocks run one after the
// other.
#include <barrier>
#include <cstdint>
#include <memory>
#include <thread>
#include <vector>

#define __device__
#define __global__
#define __shared__ static

struct Index {
  unsigned x = 0;
};

static thread_local Index threadIdx;
static Index blockIdx, blockDim, gridDim;
static std::unique_ptr<std::barrier<>> whole_block;
static std::vector<std::unique_ptr<std::barrier<>>> warps;
static bool flags[1024];

static void __syncthreads() { whole_block->arrive_and_wait(); }

static int __popc(unsigned bits) { return __builtin_popcount(bits); }

static unsigned __ballot_sync(unsigned, bool flag) {
  const unsigned warp = threadIdx.x / 32;
  flags[threadIdx.x] = flag;
  warps[warp]->arrive_and_wait();
  unsigned raised = 0;
  for (unsigned lane = 0; lane < 32; ++lane) raised |= unsigned(flags[warp * 32 + lane]) << lane;
  warps[warp]->arrive_and_wait();
  return raised;
}

#include "cuda/pack_kernels.cuh"
#include "cuda/prune_kernel.cuh"

// Runs kernel() as `blocks` blocks of `size` threads.
template <class Kernel>
static void launch(unsigned blocks, unsigned size, const Kernel& kernel) {
  blockDim.x = size;
  gridDim.x = blocks;
  whole_block = std::make_unique<std::barrier<>>(size);
  warps.clear();
  for (unsigned w = 0; w < size / 32; ++w) warps.push_back(std::make_unique<std::barrier<>>(32));
  std::barrier<> between(size);
  std::vector<std::thread> threads;
  for (unsigned t = 0; t < size; ++t) {
    threads.emplace_back([&, t] {
      threadIdx.x = t;
      for (unsigned block = 0; block < blocks; ++block) {
        if (t == 0) blockIdx.x = block;
        between.arrive_and_wait();
        kernel();
        between.arrive_and_wait();
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
}

using namespace cppo::cuda;

extern "C" {

void sizes(unsigned threads, const Masks* masks, int32_t* tokens, int32_t* rows, uint8_t* orphans,
           int64_t* out) {
  launch(masks->num_kept, threads, [&] { count_kernel(*masks, tokens, rows, orphans); });
  launch(1, threads, [&] { sum_kernel(masks->num_kept, tokens, rows, orphans, out); });
}

void pack(unsigned threads, const Masks* masks, const Streams* out, const Columns* columns) {
  launch(masks->num_kept, threads, [&] { pack_kernel(*masks, *out, *columns); });
}

void prune(unsigned threads, const PruneArgs* args) {
  launch(args->total / args->unit_size, threads, [&] { advantages_and_prune_kernel(*args); });
}

void move(bool unpack, unsigned blocks, unsigned threads, const int64_t* index, int64_t num_rows,
          int64_t num_places, const Columns* columns) {
  launch(blocks, threads, [&] {
    if (unpack) return move_kernel<true>(index, num_rows, num_places, *columns);
    move_kernel<false>(index, num_rows, num_places, *columns);
  });
}
}
