// The kernels of pack_completions.cu: device code alone, so that a test can also run it on the CPU.
//
// One block per kept completion walks its row from left to right, a block's width at a time. Where
// a token lands is the number of tokens before it, by ballots within a warp and sums over the
// warps: no atomics, hence repeatable, and bit for bit the CPU's result.
#pragma once

#include <cstdint>

namespace cppo::cuda {

constexpr int kWarp = 32;
constexpr int kMaxThreads = 1024;
constexpr int kMaxColumns = 48;  // tensors of one launch: kernel arguments end at 4 KB

struct Mask {
  const void* data;  // (B, L), contiguous
  int bytes;

  __device__ bool at(int64_t i) const {
    if (bytes == 1) return static_cast<const uint8_t*>(data)[i] != 0;
    if (bytes == 4) return static_cast<const int32_t*>(data)[i] != 0;
    return static_cast<const int64_t*>(data)[i] != 0;
  }
};

struct Masks {
  Mask attention, completion;
  const int64_t* kept;  // (K,)
  int64_t num_completions, length, num_kept;
};

// A tensor that is taken along; elements are moved as bytes.
struct Column {
  const void* from;
  void* to;
  int bytes;
};

struct Columns {
  Column column[kMaxColumns];
  int count;
};

struct Streams {
  const int32_t* cu_seqlens;      // (K+1,)
  const int32_t* row_cu_seqlens;  // (K+1,)
  int64_t* position_ids;
  int64_t* rows;
  int64_t* token_index;
  int64_t* target_index;
  Column input_ids;
};

struct alignas(16) Wide {
  uint64_t low, high;
};

template <class T>
__device__ void move_as(const Column& column, int64_t to, int64_t from) {
  static_cast<T*>(column.to)[to] = static_cast<const T*>(column.from)[from];
}

__device__ inline void move(const Column& column, int64_t to, int64_t from) {
  switch (column.bytes) {
    case 1: return move_as<uint8_t>(column, to, from);
    case 2: return move_as<uint16_t>(column, to, from);
    case 4: return move_as<uint32_t>(column, to, from);
    case 8: return move_as<uint64_t>(column, to, from);
    default: return move_as<Wide>(column, to, from);
  }
}

struct Scan {
  int before, total;
};

// How many threads of the block before this one raise the flag, and how many of all.
__device__ inline Scan scan(bool flag, int* per_warp) {
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const unsigned raised = __ballot_sync(0xffffffffu, flag);
  if (lane == 0) per_warp[warp] = __popc(raised);
  __syncthreads();
  Scan result = {__popc(raised & ((1u << lane) - 1)), 0};
  const int warps = blockDim.x / kWarp;
  for (int w = 0; w < warps; ++w) {
    result.before += w < warp ? per_warp[w] : 0;
    result.total += per_warp[w];
  }
  __syncthreads();
  return result;
}

struct Counts {
  int tokens, rows;
  bool is_orphan;  // the first attended token is marked: nothing predicts it
};

// Calls visit(column, position, row or -1) for every attended token of one completion; position
// and row count from the completion's start.
template <class Visit>
__device__ Counts walk(const Masks& masks, int64_t completion, const Visit& visit) {
  __shared__ int per_warp[kMaxThreads / kWarp];
  Counts counts = {0, 0, false};
  const int64_t base = completion * masks.length;
  for (int64_t first = 0; first < masks.length; first += blockDim.x) {
    const int64_t column = first + threadIdx.x;
    const bool attended = column < masks.length && masks.attention.at(base + column);
    const bool marked = attended && masks.completion.at(base + column);
    const Scan tokens = scan(attended, per_warp);
    const int position = counts.tokens + tokens.before;
    // The first attended token has no row that predicts it.
    const bool response = marked && position > 0;
    const Scan rows = scan(response, per_warp);
    if (counts.tokens == 0) counts.is_orphan = scan(marked && position == 0, per_warp).total > 0;
    if (attended) visit(column, position, response ? counts.rows + rows.before : -1);
    counts.tokens += tokens.total;
    counts.rows += rows.total;
  }
  return counts;
}

__device__ inline bool is_row(const Masks& masks, int64_t completion) {
  return completion >= 0 && completion < masks.num_completions;
}

// Tokens and rows of completion k go to place k + 1 of the running sums.
__global__ void count_kernel(Masks masks, int32_t* tokens, int32_t* rows, uint8_t* orphans) {
  const int64_t k = blockIdx.x, completion = masks.kept[k];
  Counts counts = {0, 0, false};
  if (is_row(masks, completion)) counts = walk(masks, completion, [](int64_t, int, int) {});
  if (threadIdx.x == 0) {
    tokens[k + 1] = counts.tokens;
    rows[k + 1] = counts.rows;
    orphans[k] = counts.is_orphan;
  }
}

// Turns both counts into running sums; sizes = [tokens, rows, longest, first orphan or -1]. One
// block: each thread owns a stretch of completions, and starts from the sum of those before it.
__global__ void sum_kernel(int64_t num_kept, int32_t* tokens, int32_t* rows,
                           const uint8_t* orphans, int64_t* sizes) {
  __shared__ int64_t sums[2][kMaxThreads];
  __shared__ int64_t extremes[2][kMaxThreads];
  const int64_t share = (num_kept + blockDim.x - 1) / blockDim.x;
  const int64_t first = threadIdx.x * share;
  const int64_t end = first + share < num_kept ? first + share : num_kept;
  int64_t total[2] = {0, 0}, longest = 0, orphan = num_kept;
  for (int64_t k = first; k < end; ++k) {
    total[0] += tokens[k + 1];
    total[1] += rows[k + 1];
    longest = tokens[k + 1] > longest ? tokens[k + 1] : longest;
    orphan = orphans[k] && orphan == num_kept ? k : orphan;
  }
  sums[0][threadIdx.x] = total[0];
  sums[1][threadIdx.x] = total[1];
  extremes[0][threadIdx.x] = longest;
  extremes[1][threadIdx.x] = orphan;
  __syncthreads();
  int64_t before[2] = {0, 0};
  for (unsigned t = 0; t < threadIdx.x; ++t) {
    before[0] += sums[0][t];
    before[1] += sums[1][t];
  }
  if (threadIdx.x == 0) {
    tokens[0] = rows[0] = 0;
    for (int part = 0; part < 2; ++part) {
      int64_t sum = 0;
      for (unsigned t = 0; t < blockDim.x; ++t) sum += sums[part][t];
      sizes[part] = sum;
    }
    for (unsigned t = 0; t < blockDim.x; ++t) {
      longest = extremes[0][t] > longest ? extremes[0][t] : longest;
      orphan = extremes[1][t] < orphan ? extremes[1][t] : orphan;
    }
    sizes[2] = longest;
    sizes[3] = orphan < num_kept ? orphan : -1;
  }
  for (int64_t k = first; k < end; ++k) {
    before[0] += tokens[k + 1];
    before[1] += rows[k + 1];
    tokens[k + 1] = static_cast<int32_t>(before[0]);
    rows[k + 1] = static_cast<int32_t>(before[1]);
  }
}

__global__ void pack_kernel(Masks masks, Streams out, Columns columns) {
  const int64_t k = blockIdx.x, completion = masks.kept[k];
  if (!is_row(masks, completion)) return;
  const int64_t base = completion * masks.length;
  const int64_t token_start = out.cu_seqlens[k], token_end = out.cu_seqlens[k + 1];
  const int64_t row_start = out.row_cu_seqlens[k], row_end = out.row_cu_seqlens[k + 1];
  walk(masks, completion, [&](int64_t column, int position, int row) {
    // Lengths that came from the host and are too small must not write past the streams.
    const int64_t token = token_start + position, target = row_start + row, at = base + column;
    if (token >= token_end) return;
    out.position_ids[token] = position;
    out.token_index[token] = at;
    move(out.input_ids, token, at);
    if (row < 0 || target >= row_end) return;
    out.rows[target] = token - 1;
    out.target_index[target] = at;
    for (int c = 0; c < columns.count; ++c) move(columns.column[c], target, at);
  });
}

// (T,) values to their places (kUnpack), or from them.
template <bool kUnpack>
__global__ void move_kernel(const int64_t* target_index, int64_t num_rows, int64_t num_places,
                            Columns columns) {
  const int64_t step = static_cast<int64_t>(blockDim.x) * gridDim.x;
  for (int64_t row = blockIdx.x * static_cast<int64_t>(blockDim.x) + threadIdx.x; row < num_rows;
       row += step) {
    const int64_t place = target_index[row];
    if (place < 0 || place >= num_places) continue;
    for (int c = 0; c < columns.count; ++c) {
      move(columns.column[c], kUnpack ? place : row, kUnpack ? row : place);
    }
  }
}

}  // namespace cppo::cuda
