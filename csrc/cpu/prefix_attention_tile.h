// What forward and backward share: packing of operands, which keys a query sees, products of a tile with a block of
// keys.
//
// In a tile the queries of all heads of a group are rows, row by row: row (r, g) is query r of head g. Keys and values,
// head_dim and value_dim wide, come as transposed panels [keys / PANEL, width, PANEL] where they are multiplied over
// their width, and as rows `stride` floats apart where they are summed over.
#pragma once

#include "prefix_attention.h"
#include "products.h"

namespace fastprompt {
namespace FASTPROMPT_SIMD {

template <typename T>
inline T* at(const Strided& x, int64_t base, int64_t row, int64_t head) {
  return static_cast<T*>(x.data) + base * x.base + row * x.row + head * x.head;
}

// Where the keys of a sequence are, by their number, which rises from call to call: rows of k, or columns of a cache.
template <typename T>
class KeyRows {
 public:
  KeyRows(const Call& call, const Strided& x, int64_t base, int64_t head)
      : schedule_(call.schedule), x_(x), base_(base), head_(head) {}

  T* operator()(int64_t n) {
    if (n >= end_) find(n);  // the first key, or the first of a page
    return from_ + (n - begin_) * x_.row;
  }

 private:
  void find(int64_t n) {
    auto const column = base_ + n, size = schedule_.block;
    auto const number = column / size, within = column % size;
    begin_ = n, end_ = n + size - within;
    from_ = at<T>(x_, schedule_.pages.size ? schedule_.pages[number] : number, within, head_);
  }

  const Schedule& schedule_;
  const Strided& x_;
  int64_t base_, head_, begin_ = 0, end_ = 0;
  T* from_ = nullptr;
};

// A row of `width` numbers, and zeros up to a whole vector.
template <typename T>
inline void pack_row(const T* from, int64_t width, float* to) {
  for (int64_t k = 0; k < width; k += LANES) store(to + k, load(from + k, smaller(LANES, width - k)));
}

template <typename T>
inline void unpack_row(const float* from, int64_t width, float factor, T* to) {
  for (int64_t k = 0; k < width; k += LANES) store(to + k, load(from + k) * factor, smaller(LANES, width - k));
}

// Keys `begin` to `begin + count` into transposed panels; row(n) is where key n is.
template <typename Row>
inline void pack_panels(Row row, int64_t begin, int64_t count, int64_t width, float* to) {
  for (int64_t n = 0; n < count; n += LANES) {
    auto const rows = smaller(LANES, count - n);
    auto const panel = to + n / PANEL * PANEL * width + n % PANEL;
    decltype(row(0)) from[LANES];
    for (int64_t i = 0; i < rows; ++i) from[i] = row(begin + n + i);
    for (int64_t k = 0; k < width; k += LANES) {
      floats x[LANES];
      auto const columns = smaller(LANES, width - k);
#pragma GCC unroll 16
      for (int64_t i = 0; i < LANES; ++i) x[i] = i < rows ? load(from[i] + k, columns) : floats{};
      transpose(x);
#pragma GCC unroll 16
      for (int64_t j = 0; j < LANES; ++j) {
        if (j < columns) store(panel + (k + j) * PANEL, x[j]);
      }
    }
  }
  if (round_up(count, PANEL) - count >= LANES) {  // the other half of the last panel
    auto const n = round_up(count, LANES);
    for (int64_t k = 0; k < width; ++k) store(to + (n / PANEL * width + k) * PANEL + n % PANEL, floats{});
  }
}

template <typename Row>
inline void pack_rows(Row row, int64_t begin, int64_t count, int64_t width, float* to, int64_t stride) {
  for (int64_t n = 0; n < count; ++n) pack_row(row(begin + n), width, to + n * stride);
}

// The queries of a tile, or what else belongs to them, as an operand of products: rows WIDTH apart, in slabs of KEYS
// columns.
struct Operand {
  float* data;
  int64_t slab;  // floats
  static int64_t floats_needed(int64_t rows, int64_t width) { return (width + KEYS - 1) / KEYS * rows * WIDTH; }
  float* at(int64_t row, int64_t column) const { return data + column / KEYS * slab + row * WIDTH + column % KEYS; }
};

// Rows of a tile in one register block, and the keys that at least one of them sees.
struct Rows {
  int64_t first, count, low, high;
};

// Ask for a row that is needed soon, so that it comes while something else is computed.
template <typename T>
inline void prefetch_row(const T* row, int64_t width) {
  constexpr int64_t line = 64 / sizeof(T);
  for (int64_t d = 0; d < width; d += line) __builtin_prefetch(row + d, 0, 2);
}

template <typename T>
inline void prefetch(const Strided& x, int64_t row, int64_t rows, int64_t head, int64_t heads, int64_t width) {
  for (auto r = row; r < row + rows; ++r) {
    for (auto h = head; h < head + heads; ++h) prefetch_row(at<T>(x, 0, r, h), width);
  }
}

// The rows of a tile: where each query stands, and for the keys at hand, which it sees.
class Queries {
 public:
  Queries(const Call& call, const Tile& tile, int64_t kv_head, float* memory)
      : call_(call), tile_(tile), group_(call.heads / call.kv_heads), head_(kv_head * group_) {
    low_ = reinterpret_cast<int32_t*>(memory);
    for (int64_t s = tile.begin; s < tile.end; ++s) count_ += call.schedule.segments[s].rows * group_;
    high_ = low_ + count_;
    rows_ = reinterpret_cast<Rows*>(round_up(reinterpret_cast<intptr_t>(high_ + count_), 8));
  }
  static int64_t floats_needed(int64_t rows) { return 2 * rows + 8 * (rows / ROWS + rows) + 16; }

  int64_t count() const { return count_; }
  int64_t group() const { return group_; }
  int64_t low(int64_t row) const { return low_[row]; }
  int64_t high(int64_t row) const { return high_[row]; }
  const Rows* begin() const { return rows_; }
  const Rows* end() const { return rows_ + blocks_; }

  // Calls f(row of the tile, row of q, head of q, position behind the prefix) for all rows.
  template <typename F>
  void each(const F& f) const {
    int64_t m = 0;
    for (int64_t s = tile_.begin; s < tile_.end; ++s) {
      auto const& segment = call_.schedule.segments[s];
      for (int64_t r = 0; r < segment.rows; ++r) {
        auto const position = segment.gap + segment.first + r;
        for (int64_t g = 0; g < group_; ++g) f(m++, segment.row + r, head_ + g, position);
      }
    }
  }

  // `count` keys from `offset` on, of a prefix of `length` keys.
  void see_prefix(int64_t length, int64_t offset, int64_t count) {
    int64_t m = 0;
    for (int64_t s = tile_.begin; s < tile_.end; ++s) {
      auto const& segment = call_.schedule.segments[s];
      for (int64_t r = 0; r < segment.rows; ++r) {
        auto const position = length + segment.gap + segment.first + r;
        see(m, smaller(larger(position - call_.window + 1 - offset, int64_t(0)), count), count);
        m += group_;
      }
    }
    make_blocks(0, count_);
  }

  void see_own(const Segment& segment, int64_t first_row) {
    auto const keys = segment.end - segment.begin;
    for (int64_t r = 0; r < segment.rows; ++r) {
      auto const i = segment.first + r - segment.begin;
      auto const low = larger(i - call_.window + 1, int64_t(0));
      see(first_row + r * group_, low, smaller(call_.causal ? i + 1 : i + smaller(call_.window, keys), keys));
    }
    make_blocks(first_row, first_row + segment.rows * group_);
  }

 private:
  void see(int64_t row, int64_t low, int64_t high) {
    for (int64_t g = 0; g < group_; ++g) {
      low_[row + g] = int32_t(low);
      high_[row + g] = int32_t(high);
    }
  }

  void make_blocks(int64_t first, int64_t end) {
    blocks_ = 0;
    while (first < end) {
      auto const next = smaller(first + ROWS, end);
      Rows rows{first, next - first, low_[first], high_[first]};
      for (auto m = first; m < next; ++m) {
        rows.low = smaller<int64_t>(rows.low, low_[m]);
        rows.high = larger<int64_t>(rows.high, high_[m]);
      }
      rows_[blocks_++] = rows;
      first = next;
    }
  }

  const Call& call_;
  const Tile& tile_;
  int64_t group_, head_, count_ = 0, blocks_ = 0;
  int32_t *low_, *high_;
  Rows* rows_;
};

// Whether the forward reads the keys of a segment where they are: packing them costs more than a few rows gain by it.
inline bool read_in_place(const Segment& segment, int64_t group) {
  auto const alone = segment.load && segment.store && segment.begin < segment.end;
  return alone && segment.rows * group <= ROWS / 2;
}

// What the tile reads: its rows of q, in the backward of out and its gradient too, and the keys it packs.
template <typename T>
inline void prefetch_tile(const Call& call, const Tile& tile, int64_t kv_head, bool backward) {
  auto const group = call.heads / call.kv_heads;
  for (auto s = tile.begin; s < tile.end; ++s) {
    auto const& segment = call.schedule.segments[s];
    prefetch<T>(call.q, segment.row, segment.rows, kv_head * group, group, call.head_dim);
    if (backward) {
      prefetch<T>(call.grad, segment.row, segment.rows, kv_head * group, group, call.value_dim);
      prefetch<T>(call.out, segment.row, segment.rows, kv_head * group, group, call.value_dim);
    }
    auto const few = segment.end - segment.begin <= KEYS;  // more would push others out of the cache
    if (segment.load && few && (backward || !read_in_place(segment, group))) {
      KeyRows<T> k(call, call.k, segment.base, kv_head), v(call, call.v, segment.base, kv_head);
      for (auto n = segment.begin; n < segment.end; ++n) {
        prefetch_row(k(n), call.head_dim);
        prefetch_row(v(n), call.value_dim);
      }
    }
  }
}

inline int64_t prefix_length_of(const Schedule& schedule, const Chunk& chunk) {
  return chunk.prefix >= 0 ? schedule.prefixes[chunk.prefix].length : 0;
}

// The pieces of a chunk's prefix, in order; none without one.
inline List<Link> links_of(const Schedule& schedule, const Chunk& chunk) {
  if (chunk.prefix < 0) return {nullptr, 0};
  auto const& prefix = schedule.prefixes[chunk.prefix];
  return {schedule.links.data + prefix.begin, prefix.end - prefix.begin};
}

// Where a query finds what its scores gain: at the position of the key.
inline const float* bias_of(const Call& call, int64_t head, int64_t position) {
  return call.bias + head * (2 * call.farthest + 1) + call.farthest - position;
}

// Scaled scores with their bias, in place of products; the factor that is left for them is 1.
inline float add_bias(const Call& call, float* products, const float* bias, int64_t start, int64_t end) {
  for (auto n = start; n < end; n += LANES) store(products + n, load(products + n) * call.scale + load(bias + n));
  return 1;
}

// For each block of rows that sees some of the keys from `from` to `to`: f(rows, first key, end key).
template <typename F>
inline void each_block(const Queries& queries, int64_t from, int64_t to, const F& f) {
  for (auto const& rows : queries) {
    auto const first = larger(rows.low, from), end = smaller(rows.high, to);
    if (first < end) f(rows, first, end);
  }
}

// products [rows, WIDTH] = queries panels^T, for the keys from `from` to `to`: whole vectors of them.
inline void multiply_panels(const Queries& queries, const Operand& operand, const float* panels, int64_t width,
                            int64_t from, int64_t to, float* products) {
  for (auto panel = from; panel < to; panel += PANEL) {
    each_block(queries, panel, smaller(panel + PANEL, to), [&](const Rows& rows, int64_t first, int64_t end) {
      auto const start = round_down(first, LANES), vectors = (end - start + LANES - 1) / LANES;
      auto const multiply = block<1>(rows.count, vectors);
      for (int64_t column = 0; column < width; column += KEYS) {
        multiply(smaller(KEYS, width - column), operand.at(rows.first, column),
                 panels + panel * width + column * PANEL + start % PANEL, PANEL,
                 products + rows.first * WIDTH + start - from, WIDTH, column > 0);
      }
    });
  }
}

// The products of row m with up to LANES keys, which stand where they were, a lane each.
template <typename T>
inline floats multiply_rows(const Operand& operand, int64_t m, const T* const (&keys)[LANES], int64_t width) {
  floats sums[LANES] = {};
  for (int64_t column = 0; column < width; column += LANES) {
    auto const row = load(operand.at(m, column));
    auto const columns = smaller(LANES, width - column);
#pragma GCC unroll 16
    for (int64_t i = 0; i < LANES; ++i) sums[i] += row * load(keys[i] + column, columns);
  }
  return totals(sums);
}

// sums [rows, width] += weights rows_of_keys, which are `key_stride` apart from that of key `from` on.
inline void add_keys(const Queries& queries, const float* weights, const float* keys, int64_t key_stride, int64_t width,
                     int64_t from, int64_t to, float* sums) {
  auto const stride = row_stride(width);
  for (int64_t column = 0; column < width; column += PANEL) {
    auto const vectors = smaller(int64_t(VECTORS), (width - column + LANES - 1) / LANES);
    each_block(queries, from, to, [&](const Rows& rows, int64_t first, int64_t end) {
      auto const a = weights + rows.first * WIDTH + first - from;
      block<1>(rows.count, vectors)(end - first, a, keys + (first - from) * key_stride + column, key_stride,
                                    sums + rows.first * stride + column, stride, true);
    });
  }
}

// sums [keys, width] += weights^T operand, or = where they are fresh. The weights of a block of rows are there, or
// zero, for all keys of the blocks of ROWS keys that hold one it sees.
inline void add_queries(const Queries& queries, const float* weights, const Operand& operand, int64_t width,
                        int64_t from, int64_t to, bool fresh, float* sums) {
  auto const stride = row_stride(width);
  for (int64_t column = 0; column < width; column += PANEL) {
    auto const vectors = smaller(int64_t(VECTORS), (width - column + LANES - 1) / LANES);
    for (auto key = from; key < to; key += ROWS) {
      auto const keys = smaller(int64_t(ROWS), to - key);
      auto const multiply = block<WIDTH>(keys, vectors);
      auto add = !fresh;
      int64_t first = 0, end = 0;  // of rows side by side that see some of the keys
      auto const flush = [&] {
        if (first < end || !add) {
          multiply(end - first, weights + first * WIDTH + key - from, operand.at(first, column), WIDTH,
                   sums + key * stride + column, stride, add);
          add = true;
        }
      };
      each_block(queries, key, key + keys, [&](const Rows& rows, int64_t, int64_t) {
        if (rows.first != end) {
          if (first < end) flush();
          first = rows.first;
        }
        end = rows.first + rows.count;
      });
      flush();
    }
  }
}

}  // namespace FASTPROMPT_SIMD
}  // namespace fastprompt
