// prompt_lstm: reads the arguments and hands the parts of each layer to torch's threads. See prompt_lstm_kernels.h for
// what is computed on them and fastprompt/ops/prompt_lstm for the definition.

#include "prompt_lstm.h"

#include "isa.h"
#include "parallel.h"
#include "tensors.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <atomic>
#include <functional>
#include <thread>
#include <vector>

#if defined(__linux__)
#include <unistd.h>
#endif

namespace fastprompt {
namespace {

using torch::stable::Tensor;
using Tensors = std::vector<Tensor>;

int64_t blocks_of(int64_t size, int64_t block) { return (size + block - 1) / block; }

// Work that comes in parts, which threads take one after the other; what a part computes depends on no other.
class Jobs {
 public:
  void add(int64_t parts, std::function<void(int64_t)> job) {
    end_.push_back((end_.empty() ? 0 : end_.back()) + parts);
    jobs_.push_back(std::move(job));
  }
  void run(int64_t most_threads) const {
    auto const parts = end_.empty() ? 0 : end_.back();
    std::atomic<int64_t> next{0};
    parallel_for(0, std::min({parts, num_threads(), most_threads}), 1, [&](int64_t, int64_t) {
      for (auto i = next++; i < parts; i = next++) {
        auto const job = std::upper_bound(end_.begin(), end_.end(), i) - end_.begin();
        jobs_[job](i - (job ? end_[job - 1] : 0));
      }
    });
  }

 private:
  std::vector<int64_t> end_;
  std::vector<std::function<void(int64_t)>> jobs_;
};

// Steps that follow one another, each in one part a member; a step begins when all parts of the one before are done. A
// member is a thread as a rule and then has the same part in every step, whose weights stay in its cache. But nobody
// says that all threads come, or come at the same time: the parts of one that is not there yet are done by the others,
// so that the wait is always for a thread that runs.
class Steps {
 public:
  Steps(int64_t count, int64_t members) : count_(count), members_(members) {}

  template <typename Part>  // part(step, member)
  void run(int64_t self, const Part& part) {
    members_[self].present = true;
    auto const members = int64_t(members_.size());
    for (int64_t step = 0; step < count_; ++step) {
      for (int64_t k = 0; k < members; ++k) {
        auto const member = (self + k) % members;
        auto& other = members_[member];
        auto expected = step;
        if ((k == 0 || !other.present) && other.claimed.compare_exchange_strong(expected, step + 1)) {
          part(step, member);
          done_.fetch_add(1, std::memory_order_release);
        }
      }
      for (int spins = 0; done_.load(std::memory_order_acquire) < (step + 1) * members; ++spins) {
        if (spins > SPINS) std::this_thread::yield();  // the core may be needed by the one that is waited for
      }
    }
  }

 private:
  static constexpr int SPINS = 1000;
  struct alignas(64) Member {
    std::atomic<int64_t> claimed{0};  // steps
    std::atomic<bool> present{false};
  };
  int64_t count_;
  std::vector<Member> members_;
  alignas(64) std::atomic<int64_t> done_{0};  // parts
};

using Cells = std::vector<Cell>;

constexpr int64_t BYTES_PER_MEMBER = 1 << 17;   // of weights, for a wait in every step
constexpr int64_t LAST_CACHE = 1 << 25;         // bytes

// Bytes of the cache that a core has to itself.
int64_t own_cache() {
#if defined(_SC_LEVEL2_CACHE_SIZE)
  // asked once: a virtual machine may have to ask its host
  static const int64_t bytes = sysconf(_SC_LEVEL2_CACHE_SIZE);
#else
  static const int64_t bytes = 0;
#endif
  return bytes > 0 ? bytes : 1 << 20;
}

// Whether the directions run at the same time. One after the other, each on all threads, a thread goes through fewer
// bytes in a step: that is better where these fit its core's cache and those of all directions do not, or not even the
// last cache.
bool side_by_side(int64_t bytes, int64_t directions, int64_t threads) {
  auto const all = bytes * directions;
  return threads > 1 && all <= LAST_CACHE / 2 && !(bytes <= own_cache() * threads && all > own_cache() * threads);
}

// part(cell, step, begin, end) for all steps in turn and the units from begin to end.
template <typename Part>
void run_steps(const Cells& cells, int64_t element, const Part& part) {
  if (cells.empty()) return;
  auto const hidden = cells[0].hidden, bytes = 4 * hidden * hidden * element, blocks = blocks_of(hidden, UNITS);
  auto const work = int64_t(cells.size()) * cells[0].steps * 4 * hidden * hidden;
  auto const threads = std::min(num_threads(), threads_for(work));
  auto const together = side_by_side(bytes, int64_t(cells.size()), threads) ? int64_t(cells.size()) : 1;
  auto const members = std::clamp<int64_t>(std::min(threads / together, bytes / BYTES_PER_MEMBER), 1, blocks);
  for (int64_t first = 0; first < int64_t(cells.size()); first += together) {
    std::vector<std::unique_ptr<Steps>> runs;
    for (int64_t i = 0; i < together; ++i) runs.push_back(std::make_unique<Steps>(cells[first + i].steps, members));
    parallel_for(0, together * members, 1, [&](int64_t begin, int64_t end) {
      for (auto i = begin; i < end; ++i) {
        auto const& cell = cells[first + i / members];
        runs[i / members]->run(i % members, [&](int64_t step, int64_t member) {
          auto const unit = [&](int64_t m) { return std::min(m * blocks / members * UNITS, hidden); };
          part(cell, step, unit(member), unit(member + 1));
        });
      }
    });
  }
}

struct Lstm {
  LstmKernels kernels;
  const Tensors& weights;
  int64_t element, layers, directions, per_cell;
  int64_t steps, inputs, hidden, width;  // P, E, H, directions * H

  Lstm(const Tensor& x, const Tensors& weights_, int64_t layers_, bool bidirectional)
      : kernels(FASTPROMPT_BEST(lstm_kernels)(dtype_of(x))), weights(weights_), element(x.element_size()),
        layers(layers_), directions(bidirectional ? 2 : 1),
        per_cell(int64_t(weights_.size()) / (layers_ * directions)), steps(x.size(0)),
        inputs(x.size(1)), hidden(weights_[1].size(1)), width(directions * hidden) {
    STD_TORCH_CHECK(x.is_contiguous(), "x must be contiguous");
    for (auto const& w : weights) STD_TORCH_CHECK(w.is_contiguous(), "weights must be contiguous");
  }

  int64_t inputs_of(int64_t layer) const { return layer ? width : inputs; }
  int64_t at(int64_t layer, int64_t direction) const { return (layer * directions + direction) * per_cell; }

  // `rows` is the layer's input, `out` its output; both padded.
  Cell cell(int64_t layer, int64_t direction, const float* rows, float* state, float* out) const {
    Cell c{};
    auto const weight = [&](int64_t i) { return weights[at(layer, direction) + i].const_data_ptr(); };
    c.w_input = weight(0), c.w_hidden = weight(1);
    if (per_cell == 4) c.b_input = weight(2), c.b_hidden = weight(3);
    c.steps = steps, c.inputs = inputs_of(layer), c.hidden = hidden, c.reversed = direction == 1;
    c.rows = rows, c.row_stride = padded(c.inputs);
    c.state = state + (layer * directions + direction) * steps * 5 * hidden;
    c.out = out + direction * hidden, c.out_stride = padded(width);
    return c;
  }

  void widen_rows(const Tensor& from, float* to) const {
    auto const columns = from.size(1);
    auto const data = static_cast<const char*>(from.const_data_ptr());
    for (int64_t row = 0; row < steps; ++row) {
      kernels.widen(data + row * columns * element, to + row * padded(columns), columns);
    }
  }
  void narrow_rows(const float* from, Tensor& to) const {
    auto const columns = to.size(1);
    for (int64_t row = 0; row < steps; ++row) {
      kernels.narrow(from + row * padded(columns), static_cast<char*>(to.data_ptr()) + row * columns * element,
                     columns);
    }
  }
  // What goes from one layer to the next, or the gradient of it.
  void drop(const Tensors& keep, int64_t layer, const float* from, float* to) const {
    auto const mask = static_cast<const float*>(keep[layer].const_data_ptr());
    for (int64_t row = 0; row < steps; ++row) {
      for (int64_t i = 0; i < width; ++i) {
        to[row * padded(width) + i] = from[row * padded(width) + i] * mask[row * width + i];
      }
    }
  }
};

void forward(Tensor x, Tensors weights, Tensors keep, int64_t layers, bool bidirectional, Tensor out, Tensor state) {
  const Lstm lstm(x, weights, layers, bidirectional);
  const Floats input(lstm.steps * padded(lstm.inputs)), outputs(2 * lstm.steps * padded(lstm.width));
  use_large_pages(state.data_ptr(), state.numel() * sizeof(float));
  lstm.widen_rows(x, input.get());
  const float* rows = input.get();
  for (int64_t layer = 0; layer < layers; ++layer) {
    auto const to = outputs.get() + layer % 2 * lstm.steps * padded(lstm.width);
    Cells cells;
    for (int64_t d = 0; d < lstm.directions; ++d) {
      cells.push_back(lstm.cell(layer, d, rows, static_cast<float*>(state.data_ptr()), to));
    }
    Jobs projections;
    for (auto const& cell : cells) {
      projections.add(blocks_of(4 * lstm.hidden, GATES), [&](int64_t i) {
        lstm.kernels.project(cell, i * GATES, std::min((i + 1) * GATES, 4 * lstm.hidden));
      });
    }
    projections.run(threads_for(lstm.steps * 4 * lstm.width * lstm.inputs_of(layer)));
    run_steps(cells, lstm.element, lstm.kernels.forward);
    if (layer + 1 < layers && !keep.empty()) lstm.drop(keep, layer, to, to);
    rows = to;
  }
  lstm.narrow_rows(rows, out);
}

// The operands of the products of one direction: see prompt_lstm.h.
struct Packed {
  Floats gates, rows, hidden;
  Packed(const Lstm& lstm, int64_t tile_rows, int64_t panel)
      : gates(blocks_of(4 * lstm.hidden, tile_rows) * tile_rows * lstm.steps),
        rows(blocks_of(lstm.steps, tile_rows) * tile_rows * 4 * lstm.hidden),
        hidden(blocks_of(lstm.hidden, panel) * panel * lstm.steps) {}
};

// grads: of x and the weights, in their dtype; empty where nobody asked for one.
void backward(Tensor grad, Tensor x, Tensors weights, Tensors keep, Tensor state, int64_t layers, bool bidirectional,
              Tensors grads) {
  const Lstm lstm(x, weights, layers, bidirectional);
  STD_TORCH_CHECK(grad.is_contiguous() && state.is_contiguous(), "grad and steps must be contiguous");
  auto const& kernels = lstm.kernels;
  int64_t written = 0;
  for (auto const& g : grads) {
    use_large_pages(g.data_ptr(), g.numel() * lstm.element);
    written += g.numel() * lstm.element;
  }
  auto const past_caches = written >= LAST_CACHE;
  auto const asked = [&](int64_t begin, int64_t end) {
    return std::any_of(grads.begin() + begin, grads.begin() + end, [](const Tensor& g) { return g.numel() > 0; });
  };
  auto const P = lstm.steps, H = lstm.hidden;
  auto const row_floats = P * padded(std::max(lstm.width, lstm.inputs)), out_floats = P * padded(lstm.width);
  const Floats input(row_floats), dropped(row_floats), outputs(layers * out_floats), above(row_floats),
      below(row_floats);
  const Floats dgates(lstm.directions * P * padded(4 * H)), dstate(2 * lstm.directions * padded(H));
  const Floats panels(P * (std::max(lstm.width, lstm.inputs) + kernels.panel));
  std::vector<Packed> packed;
  for (int64_t d = 0; d < lstm.directions; ++d) packed.emplace_back(lstm, kernels.tile_rows, kernels.panel);

  auto const cells_of = [&](int64_t layer, const float* rows) {
    Cells cells;
    for (int64_t d = 0; d < lstm.directions; ++d) {
      auto cell = lstm.cell(layer, d, rows, static_cast<float*>(state.data_ptr()), outputs.get() + layer * out_floats);
      cell.dout = above.get() + d * H, cell.dout_stride = padded(lstm.width);
      cell.dgates = dgates.get() + d * P * padded(4 * H);
      cell.dhidden = dstate.get() + 2 * d * padded(H), cell.dcell = cell.dhidden + padded(H);
      cells.push_back(cell);
    }
    return cells;
  };
  parallel_for(0, layers * lstm.directions * P, (1 << 12) / H + 1, [&](int64_t begin, int64_t end) {
    for (auto i = begin; i < end; ++i) {
      auto const layer = i / P / lstm.directions, direction = i / P % lstm.directions;
      kernels.outputs(cells_of(layer, nullptr)[direction], i % P);
    }
  });
  lstm.widen_rows(x, input.get());
  lstm.widen_rows(grad, above.get());

  for (auto layer = layers - 1; layer >= 0; --layer) {
    const float* rows = layer ? outputs.get() + (layer - 1) * out_floats : input.get();
    if (layer && !keep.empty()) {
      lstm.drop(keep, layer - 1, rows, dropped.get());
      rows = dropped.get();
    }
    auto const need_rows = asked(0, lstm.at(layer, 0) + 1);
    auto const width = lstm.inputs_of(layer);
    Cells cells;
    std::vector<int64_t> ids;  // of their directions
    for (int64_t d = 0; d < lstm.directions; ++d) {
      auto const first = 1 + lstm.at(layer, d);
      if (!need_rows && !asked(first, first + lstm.per_cell)) continue;
      cells.push_back(cells_of(layer, rows)[d]);
      ids.push_back(d);
    }
    run_steps(cells, lstm.element, [&](const Cell& cell, int64_t step, int64_t begin, int64_t end) {
      kernels.backward(cell, P - 1 - step, begin, end);
    });

    Jobs packing, products;
    if (need_rows) {
      auto const group = int64_t(8);  // panels: as many columns of the weights lie side by side
      products.add(blocks_of(blocks_of(width, kernels.panel), group), [&, group](int64_t i) {
        for (size_t c = 0; c < cells.size(); ++c) {
          kernels.input_gradient(cells[c], packed[ids[c]].rows.get(), i * group,
                                 std::min((i + 1) * group, blocks_of(width, kernels.panel)), below.get(),
                                 padded(width), c > 0);
        }
      });
    }
    auto any_input = false;
    for (size_t c = 0; c < cells.size(); ++c) {
      auto const& cell = cells[c];
      auto const& to = packed[ids[c]];
      auto const dweights = grads.begin() + 1 + lstm.at(layer, ids[c]);
      auto const needs = [&lstm, dweights](int64_t i) { return i < lstm.per_cell && dweights[i].numel() > 0; };
      any_input = any_input || needs(0);
      if (need_rows) {
        packing.add(blocks_of(P, kernels.tile_rows), [&](int64_t i) { kernels.pack_rows(cell, i, to.rows.get()); });
      }
      if (needs(0) || needs(1) || needs(2) || needs(3)) {
        packing.add(blocks_of(4 * H, kernels.tile_rows),
                    [&](int64_t i) { kernels.pack_gates(cell, i, to.gates.get()); });
      }
      if (needs(1)) {
        packing.add(blocks_of(H, kernels.panel), [&](int64_t i) {
          kernels.pack_panel(cell.out, cell.out_stride, P, H, i, to.hidden.get());
        });
      }
      products.add(blocks_of(4 * H, kernels.tile_rows), [&, dweights, needs](int64_t i) {
        auto const gates = to.gates.get(), hidden = to.hidden.get();
        if (needs(0)) {
          kernels.weight_gradient(cell, gates, panels.get(), P, width, i, dweights[0].data_ptr(), past_caches);
        }
        if (needs(1)) {  // with the hidden state of the row before, or behind; that of the first step is zero
          auto const next = cell.reversed ? 0 : kernels.tile_rows, before = cell.reversed ? kernels.panel : 0;
          kernels.weight_gradient(cell, gates + next, hidden + before, std::max<int64_t>(P - 1, 0), H, i,
                                  dweights[1].data_ptr(), past_caches);
        }
        if (needs(2) || needs(3)) {
          auto const bias = [&](int64_t k) { return needs(k) ? dweights[k].data_ptr() : nullptr; };
          kernels.bias_gradient(cell, gates, i, bias(2), bias(3));
        }
      });
    }
    if (any_input) {
      packing.add(blocks_of(width, kernels.panel), [&](int64_t i) {
        kernels.pack_panel(rows, padded(width), P, width, i, panels.get());
      });
    }
    auto const work = P * 4 * lstm.width * width;
    packing.run(threads_for(work / 16));
    products.run(threads_for(work));
    if (!need_rows) break;
    if (layer) {
      if (!keep.empty()) {
        lstm.drop(keep, layer - 1, below.get(), above.get());
      } else {
        std::copy_n(below.get(), out_floats, above.get());
      }
    } else {
      lstm.narrow_rows(below.get(), grads[0]);
    }
  }
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(fastprompt, m) {
  m.def("prompt_lstm_cpu(Tensor x, Tensor[] weights, Tensor[] keep, int num_layers, bool bidirectional, "
        "Tensor(a!) out, Tensor(b!) steps) -> ()");
  m.def("prompt_lstm_backward_cpu(Tensor grad, Tensor x, Tensor[] weights, Tensor[] keep, Tensor steps, "
        "int num_layers, bool bidirectional, Tensor(a!)[] grads) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(fastprompt, CPU, m) {
  m.impl("prompt_lstm_cpu", TORCH_BOX(&forward));
  m.impl("prompt_lstm_backward_cpu", TORCH_BOX(&backward));
}

}  // namespace fastprompt
