// The functions of one instruction set: see prefix_attention.h.
#pragma once

#include "prefix_attention_backward.h"
#include "prefix_attention_forward.h"

namespace fastprompt {
namespace FASTPROMPT_SIMD {

template <typename T>
struct Attention {
  static void pack_piece(const Call& call, int64_t kv_head, int64_t number, bool backward) {
    auto const& piece = call.schedule.pieces[number];
    auto const slot = kv_head * call.schedule.prefix_slots + piece.slot;
    auto const head_dim = call.head_dim, value_dim = call.value_dim;
    auto const key_stride = row_stride(head_dim), value_stride = row_stride(value_dim);
    auto const& keys = piece.learned ? call.prefix_k : call.k;
    auto const& values = piece.learned ? call.prefix_v : call.v;
    auto const k = [&](int64_t n) { return at<T>(keys, piece.base, piece.row + n, kv_head); };
    auto const v = [&](int64_t n) { return at<T>(values, piece.base, piece.row + n, kv_head); };
    pack_panels(k, 0, piece.length, head_dim, call.prefix_kt + slot * head_dim);
    if (backward) {
      pack_panels(v, 0, piece.length, value_dim, call.prefix_vt + slot * value_dim);
      pack_rows(k, 0, piece.length, head_dim, call.prefix_krows + slot * key_stride, key_stride);
    } else {
      pack_rows(v, 0, piece.length, value_dim, call.prefix_vrows + slot * value_stride, value_stride);
    }
  }

  static void forward(const Call& call, int64_t kv_head, int64_t chunk, float* workspace) {
    Forward(call, workspace).run<T>(kv_head, call.schedule.chunks[chunk]);
  }

  static void backward(const Call& call, int64_t kv_head, int64_t chunk, float* workspace) {
    Backward(call, workspace).run<T>(kv_head, chunk);
  }

  static void add_split_parts(const Call& call, int64_t kv_head, int64_t number) {
    auto const& split = call.schedule.splits[number];
    auto const add = [&](const float* parts, int64_t width, const Strided& to) {
      auto const stride = row_stride(width);
      KeyRows<T> rows(call, to, split.base, kv_head);
      for (int64_t n = 0; to.data && n < split.length; ++n) {
        auto const row = rows(n);
        for (int64_t d = 0; d < width; d += LANES) {
          floats sum{};
          for (auto i = split.begin; i < split.end; ++i) {
            auto const& part = call.schedule.parts[i];
            auto const slot = kv_head * call.schedule.split_parts + part.slot + n - part.begin;
            if (part.begin <= n && n < part.end) sum += load(parts + slot * stride + d);
          }
          store(row + d, sum, smaller(LANES, width - d));
        }
      }
    };
    add(call.split_dk, call.head_dim, call.dk);
    add(call.split_dv, call.value_dim, call.dv);
  }

  // Parts are added in the order of the chunks, whichever thread made them; rows of k have gradients of their own.
  static void add_piece_parts(const Call& call, int64_t kv_head, int64_t number) {
    auto const& piece = call.schedule.pieces[number];
    auto const add = [&](const float* parts, int64_t width, float factor, const Strided& to) {
      auto const stride = row_stride(width);
      for (int64_t n = 0; to.data && n < piece.length; ++n) {
        auto const row = at<T>(to, piece.base, piece.row + n, kv_head);
        for (int64_t d = 0; d < width; d += LANES) {
          auto const columns = smaller(LANES, width - d);
          floats sum{};
          for (auto i = piece.begin; i < piece.end; ++i) {
            auto const slot = kv_head * call.schedule.prefix_parts + call.schedule.readers[i].part + n;
            sum += load(parts + slot * stride + d);
          }
          sum *= factor;
          store(row + d, piece.learned ? sum : sum + load(row + d, columns), columns);
        }
      }
    };
    add(call.prefix_dk, call.head_dim, call.scale, piece.learned ? call.dprefix_k : call.dk);
    add(call.prefix_dv, call.value_dim, 1, piece.learned ? call.dprefix_v : call.dv);
  }

  static AttentionKernels kernels() {
    return {&Forward::floats_needed, &Backward::floats_needed, &pack_piece,     &forward,
            &backward,               &add_split_parts,         &add_piece_parts};
  }
};

AttentionKernels attention_kernels(Dtype dtype) {
  return dtype == Dtype::fp32   ? Attention<float>::kernels()
         : dtype == Dtype::bf16 ? Attention<bf16>::kernels()
                                : Attention<fp16>::kernels();
}

}  // namespace FASTPROMPT_SIMD
}  // namespace fastprompt
