// The cells of a row plan: what fastprompt/layout/cells.py does in PyTorch, in one pass over them and by its names.

#include "tensors.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cstdint>
#include <optional>
#include <unordered_map>

namespace fastprompt {
namespace {

using torch::stable::Tensor;
using MaybeTensor = std::optional<Tensor>;

constexpr int64_t IGNORE = -100;

// Ints of which there may be none.
class MaybeInts {
 public:
  explicit MaybeInts(const MaybeTensor& x) {
    if (x) ints_.emplace(*x);
  }
  explicit operator bool() const { return ints_.has_value(); }
  int64_t operator[](int64_t i) const { return (*ints_)[i]; }

 private:
  std::optional<Ints> ints_;
};

// Column c of sequence b is place begin(b) + c of the flat tensors.
struct Cells {
  MaybeInts starts, lengths, labels, virtual_tokens;
  const bool* real;  // null: everything is
  int64_t width;
  bool front;  // whether rows of the prompt stand in front

  Cells(const MaybeTensor& real_, const MaybeTensor& labels_, const MaybeTensor& virtual_, const MaybeTensor& starts_,
        const MaybeTensor& lengths_, int64_t width_, bool front_)
      : starts(starts_), lengths(lengths_), labels(labels_), virtual_tokens(virtual_),
        real(real_ ? static_cast<const bool*>(real_->const_data_ptr()) : nullptr), width(width_), front(front_) {}

  int64_t begin(int64_t b) const { return starts ? starts[b] : b * width; }
  int64_t columns(int64_t b) const { return lengths ? lengths[b] : width; }
  bool is_real(int64_t place) const { return !real || real[place]; }
  // Without rows in front nothing predicts the first token.
  bool is_wanted(int64_t place, int64_t column) const {
    return labels && labels[place] != IGNORE && (front || column > 0);
  }
};

// A [lines, n] tensor of int64, line by line.
int64_t* line(const Tensor& x, int64_t i) { return static_cast<int64_t*>(x.data_ptr()) + i * x.size(1); }

// How many tokens, from column 0 on, are those of another sequence.
int64_t agreement(const Cells& cells, const Ints& tokens, int64_t b, int64_t other) {
  auto const begin = cells.begin(b), begin_other = cells.begin(other);
  auto const columns = std::min(cells.columns(b), cells.columns(other));
  auto const alike = [&](int64_t c) {
    if (!cells.is_real(begin + c) || !cells.is_real(begin_other + c)) return false;
    if (cells.virtual_tokens) {
      auto const mine = cells.virtual_tokens[begin + c], theirs = cells.virtual_tokens[begin_other + c];
      if (mine >= 0 || theirs >= 0) return mine == theirs;
    }
    return tokens[begin + c] == tokens[begin_other + c];
  };
  int64_t c = 0;
  while (c < columns && alike(c)) ++c;
  return c;
}

// stats [9, B]: length, first, holes, labels, behind_padding, out_of_range, agree, prompt, needed.
void measure(MaybeTensor real, MaybeTensor labels, MaybeTensor virtual_tokens, MaybeTensor token_ids,
             MaybeTensor prompts, MaybeTensor starts, MaybeTensor lengths, int64_t width, int64_t prompt_length,
             bool front, Tensor stats) {
  const Cells cells(real, labels, virtual_tokens, starts, lengths, width, front);
  const MaybeInts tokens(token_ids), prompt(prompts);
  auto const batch = stats.size(1);
  for (int64_t b = 0; b < batch; ++b) {
    auto const begin = cells.begin(b), columns = cells.columns(b);
    int64_t length = 0, first = 0, runs = 0, wanted = 0, needed = 0, behind_padding = 0, out_of_range = 0;
    bool before = false;
    for (int64_t c = 0; c < columns; ++c) {
      auto const place = begin + c;
      auto const live = cells.is_real(place);
      if (cells.is_wanted(place, c)) {
        ++wanted;
        needed = c;
        behind_padding += c > 0 && !before;
      }
      if (live) {
        if (length++ == 0) first = c;
        runs += !before;
        out_of_range += cells.virtual_tokens && cells.virtual_tokens[place] >= prompt_length;
      }
      before = live;
    }
    const int64_t found[] = {length, first, runs > 1, wanted, behind_padding > 0, out_of_range > 0, 0,
                             prompt ? prompt[b] : 0, needed};
    for (int64_t i = 0; i < stats.size(0); ++i) line(stats, i)[b] = found[i];
  }
  if (!tokens) return;
  const Ints ids(*token_ids);
  std::unordered_map<int64_t, int64_t> leaders;  // of a prompt, the first sequence that has a token
  for (int64_t b = 0; b < batch; ++b) {
    if (line(stats, 0)[b] == 0) continue;
    auto const leader = leaders.emplace(line(stats, 7)[b], b).first->second;
    line(stats, 6)[b] = agreement(cells, ids, b, leader);
  }
}

// table [7, E]: prompt_row, own_row, own_column, first_label, prompt, writes, end. What is read is written to the rest.
void fill(MaybeTensor real, MaybeTensor labels, MaybeTensor virtual_tokens, MaybeTensor starts, MaybeTensor lengths,
          Tensor table, int64_t width, int64_t front, int64_t prompt_length, int64_t prefix_length, Tensor source,
          Tensor position_ids, Tensor grid, MaybeTensor label_rows, MaybeTensor shifted) {
  const Cells cells(real, labels, virtual_tokens, starts, lengths, width, front > 0);
  auto const to_source = static_cast<int64_t*>(source.data_ptr());
  auto const to_position = static_cast<int64_t*>(position_ids.data_ptr());
  auto const to_label_row = labels ? static_cast<int64_t*>(label_rows->data_ptr()) : nullptr;
  auto const to_label = labels ? static_cast<int64_t*>(shifted->data_ptr()) : nullptr;
  auto const batch = grid.size(0);
  for (int64_t e = 0; e < table.size(1); ++e) {
    auto const prompt_row = line(table, 0)[e], own_row = line(table, 1)[e], own_column = line(table, 2)[e];
    auto const prompt = line(table, 4)[e], end = line(table, 6)[e];
    auto const writes = line(table, 5)[e] != 0;
    for (int64_t j = 0; writes && j < front; ++j) {
      to_source[prompt_row + j] = -1 - (prompt * front + j);
      to_position[prompt_row + j] = prefix_length + j;
    }
    if (e >= batch) continue;  // a prompt that no sequence has
    auto const row_of = [&](int64_t c) { return (c >= own_column ? own_row : prompt_row + front) + c; };
    auto const begin = cells.begin(e), columns = cells.columns(e);
    auto const cell = line(grid, e);
    auto next = line(table, 3)[e];
    for (int64_t j = 0; j < front; ++j) cell[j] = prompt_row + j;
    for (int64_t c = 0; c < columns; ++c) {
      auto const place = begin + c, row = row_of(c);
      auto const live = cells.is_real(place) && c < end;
      cell[front + c] = live ? row : -1;
      if (live && (writes || c >= own_column)) {
        auto const number = cells.virtual_tokens ? cells.virtual_tokens[place] : -1;
        to_source[row] = number >= 0 ? -1 - (prompt * prompt_length + number) : place;
        to_position[row] = prefix_length + front + c;
      }
      if (cells.is_wanted(place, c)) {
        to_label_row[next] = row_of(c - 1);
        to_label[next++] = cells.labels[place];
      }
    }
    std::fill(cell + front + columns, cell + front + width, int64_t(-1));
  }
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(fastprompt, m) {
  m.def("row_plan_measure_cpu(Tensor? real, Tensor? labels, Tensor? virtual_tokens, Tensor? token_ids, "
        "Tensor? prompts, Tensor? starts, Tensor? lengths, int width, int prompt_length, bool front, "
        "Tensor(a!) stats) -> ()");
  m.def("row_plan_fill_cpu(Tensor? real, Tensor? labels, Tensor? virtual_tokens, Tensor? starts, Tensor? lengths, "
        "Tensor table, int width, int front, int prompt_length, int prefix_length, Tensor(a!) source, "
        "Tensor(b!) position_ids, Tensor(c!) grid, Tensor(d!)? label_rows, Tensor(e!)? shifted) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(fastprompt, CPU, m) {
  m.impl("row_plan_measure_cpu", TORCH_BOX(&measure));
  m.impl("row_plan_fill_cpu", TORCH_BOX(&fill));
}

}  // namespace fastprompt
