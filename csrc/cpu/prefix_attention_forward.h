// One item of the forward pass: online softmax over blocks of keys.
#pragma once

#include "prefix_attention_tile.h"

#include <type_traits>

namespace fastprompt {
namespace FASTPROMPT_SIMD {

struct Forward {
  const Call& call;
  int64_t head_dim, value_dim, value_stride;
  Operand q;
  float *sums, *weights, *largest, *totals, *queries;
  float *panels, *values;  // of one sequence: it is done with them before the next one packs its own
  uint64_t* dropout_keys;  // of the rows
  const float** biases;    // of the rows, see bias_of

  Forward(const Call& c, float* memory)
      : call(c), head_dim(c.head_dim), value_dim(c.value_dim), value_stride(row_stride(c.value_dim)) {
    auto const rows = most_rows(c);
    auto const take = [&](int64_t floats) {
      auto const p = memory;
      memory += round_up(floats, 16);
      return p;
    };
    q = {take(Operand::floats_needed(rows, head_dim)), rows * WIDTH};
    sums = take(rows * value_stride);
    weights = take(rows * WIDTH);
    largest = take(rows);
    totals = take(rows);
    queries = take(Queries::floats_needed(rows));
    dropout_keys = reinterpret_cast<uint64_t*>(take(2 * rows));
    biases = reinterpret_cast<const float**>(take(2 * rows));
    panels = take(c.schedule.span * head_dim);
    values = take(c.schedule.span * value_stride);
    end = memory;
  }
  float* end;

  static int64_t most_rows(const Call& call) { return call.schedule.rows * (call.heads / call.kv_heads); }
  static int64_t floats_needed(const Call& call) { return Forward(call, nullptr).end - static_cast<float*>(nullptr); }

  template <typename T>
  void run(int64_t kv_head, const Chunk& chunk) {
    auto const& schedule = call.schedule;
    auto const prefix_length = prefix_length_of(schedule, chunk);
    prefetch_tile<T>(call, schedule.tiles[chunk.begin], kv_head, false);
    for (auto t = chunk.begin; t < chunk.end; ++t) {
      auto const& tile = schedule.tiles[t];
      Queries rows(call, tile, kv_head, queries);
      load_queries<T>(rows, prefix_length);
      if (t + 1 < chunk.end) prefetch_tile<T>(call, schedule.tiles[t + 1], kv_head, false);
      for (auto const& link : links_of(schedule, chunk)) {
        auto const& piece = schedule.pieces[link.piece];
        auto const slot = kv_head * schedule.prefix_slots + piece.slot;
        rows.see_prefix(prefix_length, link.offset, piece.length);
        attend(rows, call.prefix_kt + slot * head_dim, call.prefix_vrows + slot * value_stride, piece.length,
               link.offset);
      }
      int64_t first = 0;
      for (auto s = tile.begin; s < tile.end; ++s) {
        auto const& segment = schedule.segments[s];
        auto const begin = segment.begin, count = segment.end - begin;
        auto const in_place = read_in_place(segment, rows.group());
        if (segment.load && !in_place) {
          const KeyRows<T> k(call, call.k, segment.base, kv_head), v(call, call.v, segment.base, kv_head);
          pack_panels(k, begin, count, head_dim, panels);
          pack_rows(v, begin, count, value_dim, values, value_stride);
        }
        rows.see_own(segment, first);
        auto const position = prefix_length + segment.gap + begin;
        if (in_place) {
          attend_in_place<T>(rows, segment, kv_head, position);
        } else {
          attend(rows, panels, values, count, position);
        }
        first += segment.rows * rows.group();
      }
      finish<T>(rows);
    }
  }

  template <typename T>
  void load_queries(const Queries& rows, int64_t prefix_length) {
    rows.each([&](int64_t m, int64_t row, int64_t head, int64_t position) {
      auto const from = at<T>(call.q, 0, row, head);
      largest[m] = -__builtin_inff();
      totals[m] = 0;
      if (call.dropout.active) dropout_keys[m] = dropout_key(call.dropout, row, head);
      if (call.bias) biases[m] = bias_of(call, head, prefix_length + position);
      for (int64_t d = 0; d < head_dim; d += LANES) {
        store(q.at(m, d), load(from + d, smaller(LANES, head_dim - d)));
      }
      for (int64_t d = 0; d < value_dim; d += LANES) store(sums + m * value_stride + d, floats{});
    });
  }

  // Of packed keys. `position` is that of the first key in its sequence.
  void attend(const Queries& rows, const float* keys, const float* values, int64_t count, int64_t position) {
    attend(
        rows, count, position,
        [&](int64_t from, int64_t to) { multiply_panels(rows, q, keys, head_dim, from, to, weights); },
        [&](int64_t from, int64_t to) {
          add_keys(rows, weights, values + from * value_stride, value_stride, value_dim, from, to, sums);
        });
  }

  // Of the keys of one sequence where they are; values are packed block by block, unless products can read them.
  template <typename T>
  void attend_in_place(const Queries& rows, const Segment& segment, int64_t kv_head, int64_t position) {
    KeyRows<T> keys(call, call.k, segment.base, kv_head), values_ahead(call, call.v, segment.base, kv_head);
    KeyRows<T> value_rows(call, call.v, segment.base, kv_head);
    auto const last = segment.end - 1;
    const T* ahead[LANES];
    auto const find = [&](int64_t n) {  // LANES keys from n on, behind the last the last
      for (int64_t i = 0; i < LANES; ++i) {
        ahead[i] = keys(smaller(n + i, last));
        prefetch_row(ahead[i], head_dim);
      }
    };
    find(segment.begin);
    auto const multiply = [&](int64_t from, int64_t to) {
      for (auto n = from; n < to; n += LANES) {
        const T* now[LANES];
        for (int64_t i = 0; i < LANES; ++i) now[i] = ahead[i];
        find(segment.begin + n + LANES);
        for (auto i = n; i < smaller(n + LANES, to); ++i) prefetch_row(values_ahead(segment.begin + i), value_dim);
        each_block(rows, n, smaller(n + LANES, to), [&](const Rows& block, int64_t, int64_t) {
          for (auto m = block.first; m < block.first + block.count; ++m) {
            store(weights + m * WIDTH + n - from, multiply_rows(q, m, now, head_dim));
          }
        });
      }
    };
    auto const add = [&](int64_t from, int64_t to) {
      auto const begin = segment.begin + from;
      if constexpr (std::is_same_v<T, float>) {
        if (call.schedule.pages.size == 0 && value_dim % LANES == 0) {
          add_keys(rows, weights, value_rows(begin), call.v.row, value_dim, from, to, sums);
          return;
        }
      }
      pack_rows(value_rows, begin, to - from, value_dim, values, value_stride);
      add_keys(rows, weights, values, value_stride, value_dim, from, to, sums);
    };
    attend(rows, segment.end - segment.begin, position, multiply, add);
  }

  // multiply(from, to) puts the products of queries with these keys into weights, add(from, to) adds up the values.
  template <typename Multiply, typename Add>
  void attend(const Queries& rows, int64_t count, int64_t position, const Multiply& multiply, const Add& add) {
    for (int64_t from = 0; from < count; from += KEYS) {
      auto const to = smaller(from + KEYS, count);
      multiply(from, to);
      each_block(rows, from, to, [&](const Rows& block, int64_t first, int64_t end) {
        for (auto m = block.first; m < block.first + block.count; ++m) {
          auto const low = larger(rows.low(m), from) - from, high = smaller(rows.high(m), to) - from;
          soften(m, first - from, end - from, low, high, position + from);
          if (call.dropout.active) drop(m, first - from, end - from, position + from);
        }
      });
      add(from, to);
    }
  }

  // Scores of row m, columns `first` to `end`, into weights; the row sees those from `low` to `high`.
  void soften(int64_t m, int64_t first, int64_t end, int64_t low, int64_t high, int64_t position) {
    auto const row = weights + m * WIDTH;
    auto const start = round_down(first, LANES);
    end = round_up(end, LANES);
    if (low >= high) {
      for (auto n = start; n < end; n += LANES) store(row + n, floats{});
      return;
    }
    auto scale = call.scale;
    if (call.bias) scale = add_bias(call, row, biases[m] + position, start, end);
    if (call.softcap > 0) {
      for (auto n = start; n < end; n += LANES) {
        store(row + n, tanh(load(row + n) * (scale / call.softcap)) * call.softcap);
      }
      scale = 1;
    }
    auto highest = broadcast(-__builtin_inff());
    for (auto n = start; n < end; n += LANES) {
      highest = maximum(between(load(row + n) * scale, low - n, high - n, -__builtin_inff()), highest);
    }
    auto const before = largest[m], now = larger(before, maximum(highest));
    if (now != before) {
      largest[m] = now;
      if (before != -__builtin_inff()) {
        auto const shrink = exp(before - now);
        totals[m] *= shrink;
        auto const sum = sums + m * value_stride;
        for (int64_t d = 0; d < value_dim; d += LANES) store(sum + d, load(sum + d) * shrink);
      }
    }
    floats added{};
    for (auto n = start; n < end; n += LANES) {
      auto const weight = between(exp(load(row + n) * scale - now), low - n, high - n, 0);
      added += weight;
      store(row + n, weight);
    }
    totals[m] += total(added);
  }

  // The sum of a row's weights stays that of all of them.
  void drop(int64_t m, int64_t first, int64_t end, int64_t position) {
    auto const row = weights + m * WIDTH;
    for (auto n = round_down(first, LANES); n < end; n += LANES) {
      store(row + n, load(row + n) * dropout_factors(call.dropout, dropout_keys[m], position + n));
    }
  }

  template <typename T>
  void finish(const Queries& rows) {
    rows.each([&](int64_t m, int64_t row, int64_t head, int64_t) {
      auto top = largest[m], weight = totals[m], factor = 1.0f;
      if (call.sinks) {
        auto const sink = call.sinks[head];
        auto const now = larger(top, sink);
        factor = exp(top - now);
        weight = weight * factor + exp(sink - now);
        top = now;
      }
      factor = weight > 0 ? factor / weight : weight;  // nan stays
      unpack_row(sums + m * value_stride, value_dim, factor, at<T>(call.out, 0, row, head));
      call.lse[head * call.query_rows + row] = weight == 0 ? -__builtin_inff() : __builtin_logf(weight) + top;
    });
  }
};

}  // namespace FASTPROMPT_SIMD
}  // namespace fastprompt
