// One item of the backward pass: weights again, from lse, and five products for every block of keys.
//
// With weights p = exp(score - lse): dv = p^T dout, dp = dout v^T, dscore = p (dp - rowsum(dout out)), dq = dscore k,
// dk = dscore^T q. Dropout's factors, 0 or 1 / (1 - probability), multiply p in dv and dp in dscore.
#pragma once

#include "prefix_attention_tile.h"

namespace fastprompt {
namespace FASTPROMPT_SIMD {

// Keys of a piece of a prefix or of one sequence.
struct Keys {
  int64_t count;
  const float *kt, *vt, *k;  // transposed panels, rows
  float *dk, *dv;            // sums of gradients, rows
};

struct Backward {
  const Call& call;
  int64_t head_dim, value_dim, key_stride, value_stride;
  bool need_scores, need_keys, need_values, need_prefix_keys, need_prefix_values;
  Operand q, grad;
  float *dq, *weights, *dscores, *lse, *delta, *queries;
  uint64_t* dropout_keys;  // of the rows
  const float** biases;    // of the rows, see bias_of
  float *kt, *vt, *k, *dk, *dv;  // of the sequences at hand
  float* end;

  Backward(const Call& c, float* memory)
      : call(c), head_dim(c.head_dim), value_dim(c.value_dim), key_stride(row_stride(c.head_dim)),
        value_stride(row_stride(c.value_dim)) {
    need_keys = c.dk.data, need_values = c.dv.data;
    need_prefix_keys = c.dprefix_k.data, need_prefix_values = c.dprefix_v.data;
    need_scores = c.dq.data || need_keys || need_prefix_keys;
    auto const rows = c.schedule.rows * (c.heads / c.kv_heads), slots = c.schedule.slots;
    auto const take = [&](int64_t floats) {
      auto const p = memory;
      memory += round_up(floats, 16);
      return p;
    };
    q = {take(Operand::floats_needed(rows, head_dim)), rows * WIDTH};
    grad = {take(Operand::floats_needed(rows, value_dim)), rows * WIDTH};
    dq = take(rows * key_stride);
    weights = take(rows * WIDTH);
    dscores = take(rows * WIDTH);
    lse = take(rows);
    delta = take(rows);
    queries = take(Queries::floats_needed(rows));
    dropout_keys = reinterpret_cast<uint64_t*>(take(2 * rows));
    biases = reinterpret_cast<const float**>(take(2 * rows));
    kt = take(slots * head_dim);
    vt = take(slots * value_dim);
    k = take(slots * key_stride);
    dk = take(slots * key_stride);
    dv = take(slots * value_stride);
    end = memory;
  }

  static int64_t floats_needed(const Call& call) { return Backward(call, nullptr).end - static_cast<float*>(nullptr); }

  template <typename T>
  void run(int64_t kv_head, int64_t number) {
    auto const& schedule = call.schedule;
    auto const& chunk = schedule.chunks[number];
    auto const sinks = call.sink_parts ? call.sink_parts + number * call.heads : nullptr;
    auto const prefix_length = prefix_length_of(schedule, chunk);
    prefetch_tile<T>(call, schedule.tiles[chunk.begin], kv_head, true);
    for (auto t = chunk.begin; t < chunk.end; ++t) {
      auto const& tile = schedule.tiles[t];
      Queries rows(call, tile, kv_head, queries);
      load_queries<T>(rows, prefix_length, sinks);
      if (t + 1 < chunk.end) prefetch_tile<T>(call, schedule.tiles[t + 1], kv_head, true);
      for (auto const& link : links_of(schedule, chunk)) {
        auto const& piece = schedule.pieces[link.piece];
        auto const with_keys = piece.learned ? need_prefix_keys : need_keys;
        auto const with_values = piece.learned ? need_prefix_values : need_values;
        rows.see_prefix(prefix_length, link.offset, piece.length);
        differentiate(rows, keys_of(kv_head, chunk, link), with_keys, with_values, t == chunk.begin, link.offset);
      }
      int64_t first = 0;
      for (auto s = tile.begin; s < tile.end; ++s) {
        auto const& segment = schedule.segments[s];
        auto const own = own_keys(segment);
        if (segment.load) load_keys<T>(segment, own, kv_head);
        rows.see_own(segment, first);
        auto const position = prefix_length + segment.gap + segment.begin;
        differentiate(rows, own, need_keys, need_values, segment.load, position);
        if (segment.store) store_keys<T>(segment, own, kv_head);
        first += segment.rows * rows.group();
      }
      if (call.dq.data) {
        rows.each([&](int64_t m, int64_t row, int64_t head, int64_t) {
          unpack_row(dq + m * key_stride, head_dim, call.scale, at<T>(call.dq, 0, row, head));
        });
      }
    }
  }

  Keys keys_of(int64_t kv_head, const Chunk& chunk, const Link& link) const {
    auto const& piece = call.schedule.pieces[link.piece];
    auto const slot = kv_head * call.schedule.prefix_slots + piece.slot;
    auto const part = kv_head * call.schedule.prefix_parts + chunk.part + link.offset;
    return {piece.length, call.prefix_kt + slot * head_dim, call.prefix_vt + slot * value_dim,
            call.prefix_krows + slot * key_stride, call.prefix_dk + part * key_stride,
            call.prefix_dv + part * value_stride};
  }

  Keys own_keys(const Segment& segment) const {
    auto const slot = segment.slot, rows = slot * key_stride;
    return {segment.end - segment.begin, kt + slot * head_dim, vt + slot * value_dim, k + rows, dk + rows,
            dv + slot * value_stride};
  }

  template <typename T>
  void load_queries(const Queries& rows, int64_t prefix_length, float* sinks) {
    rows.each([&](int64_t m, int64_t row, int64_t head, int64_t position) {
      auto const from = at<T>(call.q, 0, row, head), out = at<T>(call.out, 0, row, head);
      auto const slope = at<T>(call.grad, 0, row, head);
      floats products{};
      for (int64_t d = 0; d < larger(head_dim, value_dim); d += LANES) {
        if (d < value_dim) {
          auto const columns = smaller(LANES, value_dim - d);
          auto const x = load(slope + d, columns);
          products += x * load(out + d, columns);
          store(grad.at(m, d), x);
        }
        if (d < head_dim) {
          store(q.at(m, d), load(from + d, smaller(LANES, head_dim - d)));
          store(dq + m * key_stride + d, floats{});
        }
      }
      delta[m] = total(products);
      if (call.dropout.active) dropout_keys[m] = dropout_key(call.dropout, row, head);
      if (call.bias) biases[m] = bias_of(call, head, prefix_length + position);
      auto const x = call.lse[head * call.query_rows + row];
      lse[m] = x == -__builtin_inff() ? __builtin_inff() : x;  // a row that sees nothing has no weight
      if (sinks) sinks[head] -= exp(call.sinks[head] - lse[m]) * delta[m];
    });
  }

  template <typename T>
  void load_keys(const Segment& segment, const Keys& own, int64_t kv_head) {
    const KeyRows<T> keys(call, call.k, segment.base, kv_head), values(call, call.v, segment.base, kv_head);
    auto const slot = segment.slot, begin = segment.begin;
    pack_panels(keys, begin, own.count, head_dim, kt + slot * head_dim);
    if (need_scores) pack_panels(values, begin, own.count, value_dim, vt + slot * value_dim);
    if (call.dq.data) pack_rows(keys, begin, own.count, head_dim, k + slot * key_stride, key_stride);
  }

  template <typename T>
  void store_keys(const Segment& segment, const Keys& own, int64_t kv_head) {
    auto const part = kv_head * call.schedule.split_parts + segment.part;
    auto const write = [&](const float* sums, int64_t width, float factor, float* parts, const Strided& to) {
      auto const stride = row_stride(width);
      KeyRows<T> rows(call, to, segment.base, kv_head);
      for (int64_t n = 0; n < own.count; ++n) {
        if (segment.part >= 0) {
          unpack_row(sums + n * stride, width, factor, parts + (part + n) * stride);
        } else {
          unpack_row(sums + n * stride, width, factor, rows(segment.begin + n));
        }
      }
    };
    if (need_keys) write(own.dk, head_dim, call.scale, call.split_dk, call.dk);
    if (need_values) write(own.dv, value_dim, 1, call.split_dv, call.dv);
  }

  // `position` is that of the first key in its sequence.
  void differentiate(const Queries& rows, const Keys& keys, bool with_keys, bool with_values, bool fresh,
                     int64_t position) {
    if (!with_keys && !with_values && !call.dq.data) return;  // own keys, where learned ones alone train
    for (int64_t from = 0; from < keys.count; from += KEYS) {
      auto const to = smaller(from + KEYS, keys.count);
      multiply_panels(rows, q, keys.kt, head_dim, from, to, weights);
      if (need_scores) multiply_panels(rows, grad, keys.vt, value_dim, from, to, dscores);
      each_block(rows, from, to, [&](const Rows& block, int64_t first, int64_t end) {
        for (auto m = block.first; m < block.first + block.count; ++m) {
          auto const low = larger(rows.low(m), from) - from, high = smaller(rows.high(m), to) - from;
          if (call.dropout.active) {
            weigh<true>(m, first - from, end - from, low, high, position + from);
          } else {
            weigh<false>(m, first - from, end - from, low, high, position + from);
          }
        }
      });
      if (with_values) add_queries(rows, weights, grad, value_dim, from, to, fresh, keys.dv);
      if (with_keys) add_queries(rows, dscores, q, head_dim, from, to, fresh, keys.dk);
      if (call.dq.data) add_keys(rows, dscores, keys.k + from * key_stride, key_stride, head_dim, from, to, dq);
    }
  }

  // Scores of row m, columns `first` to `end`, into weights, and their gradients; the row sees those from `low` to
  // `high`.
  template <bool dropout>
  void weigh(int64_t m, int64_t first, int64_t end, int64_t low, int64_t high, int64_t position) {
    auto const weight = weights + m * WIDTH, dscore = dscores + m * WIDTH;
    auto const start = round_down(first, LANES), stop = round_up(end, LANES);
    auto const scale = call.bias ? add_bias(call, weight, biases[m] + position, start, stop) : call.scale;
    for (auto n = start; n < stop; n += LANES) {
      auto score = load(weight + n) * scale, slope = broadcast(1.0f);
      if (call.softcap > 0) {
        auto const capped = tanh(load(weight + n) * (scale / call.softcap));
        slope = 1.0f - capped * capped;
        score = capped * call.softcap;
      }
      auto const p = between(exp(score - lse[m]), low - n, high - n, 0);
      auto dweight = load(dscore + n), used = p;
      if constexpr (dropout) {
        auto const factor = dropout_factors(call.dropout, dropout_keys[m], position + n);
        dweight *= factor, used *= factor;
      }
      store(weight + n, used);
      if (need_scores) store(dscore + n, between(p * slope * (dweight - delta[m]), low - n, high - n, 0));
    }
    auto const hide = [&](int64_t n) { store(weight + n, floats{}), store(dscore + n, floats{}); };
    if (round_down(first, ROWS) < start) hide(start - LANES);
    if (round_up(end, ROWS) > stop) hide(stop);
  }
};

}  // namespace FASTPROMPT_SIMD
}  // namespace fastprompt
