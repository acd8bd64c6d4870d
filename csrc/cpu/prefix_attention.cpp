// prefix_attention: reads the arguments and hands the items of a call to torch's threads. See prefix_attention.h for
// the schedule and fastprompt/ops/prefix_attention for what is computed.

#include "prefix_attention.h"

#include "isa.h"
#include "parallel.h"
#include "tensors.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <atomic>
#include <optional>
#include <vector>

namespace fastprompt {
namespace {

using torch::stable::Tensor;
using Tables = std::vector<Tensor>;

template <typename T>
List<T> list(const Tensor& x) {
  auto const fits = x.element_size() == 8 && x.is_contiguous() && x.numel() * 8 % sizeof(T) == 0;
  STD_TORCH_CHECK(fits, "a schedule is made of int64");
  return {static_cast<const T*>(x.const_data_ptr()), int64_t(x.numel() * 8 / sizeof(T))};
}

// The order is that of schedule.py.
Schedule read_schedule(const Tables& x) {
  STD_TORCH_CHECK(x.size() == 11, "a schedule has 11 tensors");
  auto const sizes = list<int64_t>(x[10]);
  STD_TORCH_CHECK(sizes.size == 8, "a schedule has 8 sizes");
  return {list<Segment>(x[0]), list<Tile>(x[1]), list<Chunk>(x[2]), list<Prefix>(x[3]), list<Link>(x[4]),
          list<Piece>(x[5]), list<Reader>(x[6]), list<Split>(x[7]), list<Part>(x[8]),
          list<int64_t>(x[9]), sizes[0], sizes[1], sizes[2], sizes[3], sizes[4], sizes[5], sizes[6], sizes[7]};
}

void* data_of(const Tensor& x) { return const_cast<void*>(x.const_data_ptr()); }

void check_columns(const Tensor& x) {
  auto const last = x.dim() - 1;
  STD_TORCH_CHECK(x.size(last) <= 1 || x.stride(last) == 1, "columns must stand side by side");
}

Strided rows_of(const Tensor& x) {  // [R, heads, width]
  check_columns(x);
  return {data_of(x), x.stride(0), x.stride(0), x.stride(1)};
}

Strided bank_of(const Tensor& x) {  // [N, P, Hkv, width]
  check_columns(x);
  return {data_of(x), x.stride(0), x.stride(1), x.stride(2)};
}

Strided keys_of(const Tensor& x) {  // [R, Hkv, width], or the cache [B, Hkv, Lmax, width]
  if (x.dim() == 3) return rows_of(x);
  check_columns(x);
  return {data_of(x), x.stride(0), x.stride(2), x.stride(1)};
}

template <typename Read>
Strided optional(const std::optional<Tensor>& x, const Read& read) {
  return x ? read(*x) : Strided{};
}

using MaybeTensor = std::optional<Tensor>;

Dropout read_dropout(std::optional<int64_t> key, int64_t threshold, double scale) {
  return {key.has_value(), uint64_t(key.value_or(0)), uint32_t(threshold), float(scale)};
}

Call read_call(const Tensor& q, const Tensor& k, const Tensor& v, const MaybeTensor& prefix_k,
               const MaybeTensor& prefix_v, const MaybeTensor& sinks, const MaybeTensor& bias, const Tables& schedule,
               bool causal, std::optional<int64_t> window, std::optional<double> softcap, double scale, Dropout dropout,
               const Tensor& out, const Tensor& lse) {
  Call call{};
  call.schedule = read_schedule(schedule);
  call.dtype = dtype_of(q);
  call.query_rows = q.size(0), call.heads = q.size(1), call.kv_heads = k.size(1);
  call.head_dim = q.size(2), call.value_dim = v.size(v.dim() - 1);
  call.causal = causal;
  call.window = window.value_or(int64_t(1) << 40);
  call.softcap = float(softcap.value_or(0));
  call.scale = float(scale);
  call.dropout = dropout;
  call.sinks = sinks ? static_cast<const float*>(sinks->const_data_ptr()) : nullptr;
  call.bias = bias ? static_cast<const float*>(bias->const_data_ptr()) : nullptr;
  call.farthest = bias ? bias->size(1) / 2 : 0;
  call.q = rows_of(q), call.k = keys_of(k), call.v = keys_of(v), call.out = rows_of(out);
  call.prefix_k = optional(prefix_k, bank_of), call.prefix_v = optional(prefix_v, bank_of);
  call.lse = static_cast<float*>(data_of(lse));
  return call;
}

constexpr int64_t FLOATS_PER_THREAD = 1 << 15;  // less to move is not worth one

// Multiplications in one product of all queries with all keys, hidden ones included, and rows as wide as those of keys
// and values on average.
int64_t products(const Call& call) {
  int64_t pairs = 0;
  for (auto const& chunk : call.schedule.chunks) {
    auto const prefix = chunk.prefix >= 0 ? call.schedule.prefixes[chunk.prefix].length : 0;
    for (auto t = chunk.begin; t < chunk.end; ++t) {
      for (auto s = call.schedule.tiles[t].begin; s < call.schedule.tiles[t].end; ++s) {
        auto const& segment = call.schedule.segments[s];
        pairs += segment.rows * (prefix + segment.end - segment.begin);
      }
    }
  }
  return pairs * call.heads * (call.head_dim + call.value_dim) / 2;
}

// Threads take items in order, the most expensive first, until none is left; what an item computes depends on no other.
template <typename Item>
void share_out(const Call& call, int64_t floats, const Item& item) {
  auto const items = call.schedule.chunks.size * call.kv_heads;
  auto const threads = std::min({items, num_threads(), threads_for(products(call))});
  std::atomic<int64_t> next{0};
  parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    for (auto thread = begin; thread < end; ++thread) {
      auto i = next++;
      if (i >= items) return;
      const Floats workspace(floats);
      for (; i < items; i = next++) item(i % call.kv_heads, i / call.kv_heads, workspace.get());
    }
  });
}

// body(key head, i) for all key heads and i; one call moves about so many floats.
template <typename Body>
void for_each(const Call& call, int64_t count, int64_t floats, const Body& body) {
  auto const grain = FLOATS_PER_THREAD / std::max<int64_t>(floats, 1) + 1;
  parallel_for(0, count * call.kv_heads, grain, [&](int64_t begin, int64_t end) {
    for (auto i = begin; i < end; ++i) body(i % call.kv_heads, i / call.kv_heads);
  });
}

// Floats of a packed piece, or of its sums, on average.
int64_t piece_floats(const Call& call, int64_t keys, int64_t width) {
  return keys * width / std::max<int64_t>(call.schedule.pieces.size, 1);
}

void forward(Tensor q, Tensor k, Tensor v, MaybeTensor prefix_k, MaybeTensor prefix_v, MaybeTensor sinks,
             MaybeTensor bias, Tables schedule, bool causal, std::optional<int64_t> window,
             std::optional<double> softcap, double scale, std::optional<int64_t> dropout_key,
             int64_t dropout_threshold, double dropout_scale, Tensor out, Tensor lse) {
  auto const dropout = read_dropout(dropout_key, dropout_threshold, dropout_scale);
  auto call =
      read_call(q, k, v, prefix_k, prefix_v, sinks, bias, schedule, causal, window, softcap, scale, dropout, out, lse);
  auto const kernels = FASTPROMPT_BEST(attention_kernels)(call.dtype);
  auto const slots = call.kv_heads * call.schedule.prefix_slots;
  const Floats panels(slots * call.head_dim), rows(slots * row_stride(call.value_dim));
  call.prefix_kt = panels.get(), call.prefix_vrows = rows.get();
  for_each(call, call.schedule.pieces.size,
           piece_floats(call, call.schedule.prefix_slots, call.head_dim + call.value_dim),
           [&](int64_t head, int64_t i) { kernels.pack_piece(call, head, i, false); });
  share_out(call, kernels.forward_floats(call),
            [&](int64_t head, int64_t chunk, float* workspace) { kernels.forward(call, head, chunk, workspace); });
}

// sink_parts [chunks, H], zero before.
void backward(Tensor grad, Tensor q, Tensor k, Tensor v, MaybeTensor prefix_k, MaybeTensor prefix_v, MaybeTensor sinks,
              MaybeTensor bias, Tensor out, Tensor lse, Tables schedule, bool causal, std::optional<int64_t> window,
              std::optional<double> softcap, double scale, std::optional<int64_t> dropout_key,
              int64_t dropout_threshold, double dropout_scale, MaybeTensor dq, MaybeTensor dk, MaybeTensor dv,
              MaybeTensor dprefix_k, MaybeTensor dprefix_v, MaybeTensor sink_parts) {
  auto const dropout = read_dropout(dropout_key, dropout_threshold, dropout_scale);
  auto call =
      read_call(q, k, v, prefix_k, prefix_v, sinks, bias, schedule, causal, window, softcap, scale, dropout, out, lse);
  auto const kernels = FASTPROMPT_BEST(attention_kernels)(call.dtype);
  call.grad = rows_of(grad), call.dq = optional(dq, rows_of);
  call.dk = optional(dk, keys_of), call.dv = optional(dv, keys_of);
  call.dprefix_k = optional(dprefix_k, bank_of), call.dprefix_v = optional(dprefix_v, bank_of);
  call.sink_parts = sink_parts ? static_cast<float*>(data_of(*sink_parts)) : nullptr;
  auto const key_stride = row_stride(call.head_dim), value_stride = row_stride(call.value_dim);
  auto const slots = call.kv_heads * call.schedule.prefix_slots;
  auto const prefix_parts = call.kv_heads * call.schedule.prefix_parts;
  auto const split_parts = call.kv_heads * call.schedule.split_parts;
  auto const& pieces = call.schedule.pieces;
  auto const chained = std::any_of(pieces.begin(), pieces.end(), [](const Piece& piece) { return !piece.learned; });
  const Floats kt(slots * call.head_dim), vt(slots * call.value_dim), krows(slots * key_stride);
  const Floats prefix_dk(dprefix_k || (chained && dk) ? prefix_parts * key_stride : 0);
  const Floats prefix_dv(dprefix_v || (chained && dv) ? prefix_parts * value_stride : 0);
  const Floats split_dk(dk ? split_parts * key_stride : 0), split_dv(dv ? split_parts * value_stride : 0);
  call.prefix_kt = kt.get(), call.prefix_vt = vt.get(), call.prefix_krows = krows.get();
  call.prefix_dk = prefix_dk.get(), call.prefix_dv = prefix_dv.get();
  call.split_dk = split_dk.get(), call.split_dv = split_dv.get();
  auto const both = call.head_dim + call.value_dim;
  for_each(call, pieces.size, piece_floats(call, call.schedule.prefix_slots, call.head_dim + both),
           [&](int64_t head, int64_t i) { kernels.pack_piece(call, head, i, true); });
  share_out(call, kernels.backward_floats(call),
            [&](int64_t head, int64_t chunk, float* workspace) { kernels.backward(call, head, chunk, workspace); });
  auto const splits = call.schedule.splits.size;
  for_each(call, splits, call.schedule.split_parts * both / std::max<int64_t>(splits, 1),
           [&](int64_t head, int64_t i) { kernels.add_split_parts(call, head, i); });
  for_each(call, pieces.size, piece_floats(call, call.schedule.prefix_parts, both),
           [&](int64_t head, int64_t i) { kernels.add_piece_parts(call, head, i); });
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(fastprompt, m) {
  m.def("prefix_attention_cpu(Tensor q, Tensor k, Tensor v, Tensor? prefix_k, Tensor? prefix_v, Tensor? sinks, "
        "Tensor? bias, Tensor[] schedule, bool causal, int? window, float? softcap, float scale, "
        "int? dropout_key, int dropout_threshold, float dropout_scale, Tensor(a!) out, Tensor(b!) lse) -> ()");
  m.def("prefix_attention_backward_cpu(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor? prefix_k, Tensor? prefix_v, "
        "Tensor? sinks, Tensor? bias, Tensor out, Tensor lse, Tensor[] schedule, bool causal, int? window, "
        "float? softcap, float scale, int? dropout_key, int dropout_threshold, float dropout_scale, "
        "Tensor(a!)? dq, Tensor(b!)? dk, Tensor(c!)? dv, Tensor(d!)? dprefix_k, Tensor(e!)? dprefix_v, "
        "Tensor(f!)? sink_parts) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(fastprompt, CPU, m) {
  m.impl("prefix_attention_cpu", TORCH_BOX(&forward));
  m.impl("prefix_attention_backward_cpu", TORCH_BOX(&backward));
}

}  // namespace fastprompt
