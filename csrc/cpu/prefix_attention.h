// prefix_attention's schedule and the functions that each instruction set compiles for itself.
//
// A call is a list of items, (key head, chunk) pairs that threads take one after the other. The schedule, made once a
// batch in fastprompt/ops/prefix_attention/schedule.py, is the same for all key heads:
//   chunk    tiles that share a prefix, enough work for a thread;
//   tile     segments whose queries, those of all query heads of a group, share the prefix's matrix products;
//   segment  queries of one sequence that stand side by side, and the own keys that they may see.
// A sequence that fits has one segment. A longer one is sliced; the slices in a chunk share their packed keys and the
// sums of their gradients, and where slices lie in several chunks, each chunk leaves a part of the gradients, added up
// at the end.
//
// A prefix is a list of pieces: keys that stand side by side, learned ones or rows of k. A piece is read where it lies
// and packed once, whatever the number of prefixes that it is part of. Each chunk leaves a part of the gradients of its
// whole prefix; at the end every piece adds up its places in the parts of all chunks that read it.
#pragma once

#include "dropout.h"

#include <cstdint>

namespace fastprompt {

struct Segment {
  int64_t row, rows;    // of q
  int64_t first;        // the number of its first query in the sequence
  int64_t base;         // where its keys start: a row of k, or a column of the cache, block by block
  int64_t begin, end;   // the keys of the sequence that are packed together
  int64_t slot;         // where they are packed, in keys; a multiple of ALIGNMENT
  int64_t gap;          // positions between the prefix and the sequence
  int64_t load, store;  // 1: packs the keys; 1: writes their gradients, which are complete
  int64_t part;         // where the gradients go as a part, in keys; -1: they are whole
};

struct Tile { int64_t begin, end; };  // segments
struct Chunk { int64_t begin, end, prefix, part; };  // tiles; which prefix, -1: none; its part of their gradients
struct Prefix { int64_t begin, end, length; };  // links
struct Link { int64_t piece, offset; };  // and where it stands in the prefix
struct Piece {
  int64_t learned;     // 1: keys of prefix_k, 0: of k
  int64_t base, row;   // the first: a prefix of prefix_k and a key of it, or a row of k and 0
  int64_t length;
  int64_t slot;        // where it is packed, in keys; a multiple of ALIGNMENT
  int64_t begin, end;  // readers
};
struct Reader { int64_t part; };  // where the gradients of a piece start in the parts of prefixes, in keys
struct Split { int64_t base, length, begin, end; };  // a sequence whose gradients come in parts
struct Part { int64_t begin, end, slot; };  // keys, and where they stand

constexpr int64_t ALIGNMENT = 32;  // of slots; a multiple of every instruction set's panel

template <typename T>
struct List {
  const T* data;
  int64_t size;
  const T* begin() const { return data; }
  const T* end() const { return data + size; }
  const T& operator[](int64_t i) const { return data[i]; }
};

struct Schedule {
  List<Segment> segments;
  List<Tile> tiles;
  List<Chunk> chunks;
  List<Prefix> prefixes;
  List<Link> links;
  List<Piece> pieces;
  List<Reader> readers;
  List<Split> splits;
  List<Part> parts;
  List<int64_t> pages;                        // which block of k each block of columns is; empty: the same
  int64_t rows, slots;                        // the most of any tile
  int64_t prefix_slots, prefix_parts, split_parts;  // in all, in keys
  int64_t span;                               // the most keys that are packed together, a multiple of ALIGNMENT
  int64_t block;                              // columns of a row of the cache, or of a page; endless for rows
  int64_t learned;                            // keys of prefix_k in pieces
};

struct Strided {  // columns stand side by side
  void* data;
  int64_t base, row, head;  // strides in elements
};

struct Call {
  Schedule schedule;
  Dtype dtype;
  int64_t query_rows, heads, kv_heads, head_dim, value_dim;
  bool causal;
  int64_t window;  // very large: none
  float softcap;   // 0: none
  float scale;
  Dropout dropout;
  const float* sinks;  // [H] or null
  const float* bias;   // [H, 2 * farthest + 1] or null: what a score gains, by position of the key less the query's
  int64_t farthest;    // further than any two positions are apart, by a vector at least
  Strided q, k, v, prefix_k, prefix_v, out;
  float* lse;  // [H, Rq]
  // Backward. A gradient that nobody asked for has no data.
  Strided grad, dq, dk, dv, dprefix_k, dprefix_v;
  float* sink_parts;  // [chunks, H] or null
  // Packed pieces, for every key head [prefix_slots]: transposed panels and rows (see prefix_attention_tile.h).
  float *prefix_kt, *prefix_vt, *prefix_krows, *prefix_vrows;
  float *prefix_dk, *prefix_dv;  // parts, for every key head [prefix_parts] rows
  float *split_dk, *split_dv;    // parts, for every key head [split_parts] rows
};

// Floats between two rows of packed rows: an odd number of cache lines, or a column's rows would fall into few sets.
constexpr int64_t row_stride(int64_t width) { return ((width + 15) / 16 | 1) * 16; }

struct AttentionKernels {
  int64_t (*forward_floats)(const Call&);   // of a thread's workspace
  int64_t (*backward_floats)(const Call&);
  void (*pack_piece)(const Call&, int64_t kv_head, int64_t piece, bool backward);
  void (*forward)(const Call&, int64_t kv_head, int64_t chunk, float* workspace);
  void (*backward)(const Call&, int64_t kv_head, int64_t chunk, float* workspace);
  void (*add_split_parts)(const Call&, int64_t kv_head, int64_t split);
  void (*add_piece_parts)(const Call&, int64_t kv_head, int64_t piece);  // to rows of k after all else is there
};

namespace portable { AttentionKernels attention_kernels(Dtype); }
namespace avx2 { AttentionKernels attention_kernels(Dtype); }
namespace avx512 { AttentionKernels attention_kernels(Dtype); }

}  // namespace fastprompt
