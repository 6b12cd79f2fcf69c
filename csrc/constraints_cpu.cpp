// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <utility>
#include <vector>

#include "kernels.hpp"

namespace rconv {
namespace {

// Below this many entries starting threads costs more than it saves.
constexpr int64_t kSerialEntries = 1 << 14;

int threads_for(Cpu lane, int64_t n_entries) {
  return n_entries < kSerialEntries ? 1 : std::max(1, lane.n_threads);
}

// One thread's way through [begin, end), which it writes in full and in order.
//
// Large arrays come in pages of 2 MiB (constraints/backends/cpu.py). Linux clears a page when it is
// first touched, from both ends towards the touched byte: last what is needed first. Touched at its
// end it is cleared upwards throughout, which is a third faster than a page that is written from
// its beginning.
template <class T>
class Pages {
 public:
  Pages(T* begin, T* end) : next_(address(begin) / kSize * kSize), end_(address(end)) {}

  // To be called before anything up to `end` is written: touches the ends of the pages up to there.
  void reach(T* end) {
    for (; next_ + kSize <= end_ && next_ < address(end); next_ += kSize) {
      *reinterpret_cast<char volatile*>(next_ + kSize - 1) = 0;
    }
  }

 private:
  static constexpr std::uintptr_t kSize = 1 << 21;
  static std::uintptr_t address(T* p) { return reinterpret_cast<std::uintptr_t>(p); }

  std::uintptr_t next_, end_;
};

// Copies n elements in fours, the last four over those before: lines are short, and a remainder of
// single elements would take as long as the rest.
template <class T>
void copy_run(T const* __restrict from, int64_t n, T* __restrict to) {
  constexpr int64_t kFour = 4;
  if (n < kFour) {
    for (int64_t j = 0; j < n; ++j) to[j] = from[j];
    return;
  }
  for (int64_t j = 0; j < n - kFour; j += kFour) std::memcpy(to + j, from + j, kFour * sizeof(T));
  std::memcpy(to + n - kFour, from + n - kFour, kFour * sizeof(T));
}

// Calls visit(index, row) for each row in [begin, end), in order.
template <class Visit>
void for_each_row(Layout const& layout, int64_t begin, int64_t end, Visit&& visit) {
  Row row = layout.row(begin);
  for (int64_t index = begin; index < end; ++index) {
    visit(index, row);
    for (int a = kAxes - 1; a >= 0 && ++row.r[a] == layout.axis[a].n_rows; --a) {
      row.r[a] = 0;
      if (a == 0) ++row.filter;
    }
  }
}

// Shares the rows out among the threads in equal blocks: each calls work(begin, end) once.
template <class Work>
void parallel_rows(Layout const& layout, int n_threads, Work&& work) {
  int64_t const n_rows = layout.n_rows();
#pragma omp parallel for schedule(static) num_threads(n_threads)
  for (int t = 0; t < n_threads; ++t) work(n_rows * t / n_threads, n_rows * (t + 1) / n_threads);
}

// Calls visit(column, source index, length) for each line of a plane of the box: its entries along
// the last axis, which are `length` neighbours in the source.
template <class Visit>
void for_each_line(Layout const& layout, Box const& box, int64_t plane, Visit&& visit) {
  int64_t const e2 = box.range[2].begin, length = box.range[2].size();
  for (int64_t e0 = box.range[0].begin; e0 < box.range[0].end; ++e0) {
    for (int64_t e1 = box.range[1].begin; e1 < box.range[1].end; ++e1) {
      visit(column_of(layout, box, plane, e0, e1, e2), source_of(layout, box, plane, e0, e1, e2),
            length);
    }
  }
}

}  // namespace

template <class Index>
void fill_offsets(Cpu lane, Layout const& layout, Index* crow) {
  Axis const* axis = layout.axis;
  int64_t const per_filter = layout.rows_per_filter();

  // One filter's rows, as a running sum; the other filters are that block, shifted.
  std::vector<int64_t> n2(axis[2].n_rows);
  for (int64_t r2 = 0; r2 < axis[2].n_rows; ++r2) n2[r2] = axis[2].entries_of(r2).size();
  int64_t block = 0;
  Index* out = crow;
  for (int64_t r0 = 0; r0 < axis[0].n_rows; ++r0) {
    for (int64_t r1 = 0; r1 < axis[1].n_rows; ++r1) {
      int64_t const n01 =
          layout.n_planes * axis[0].entries_of(r0).size() * axis[1].entries_of(r1).size();
      for (int64_t const n : n2) {
        *out++ = static_cast<Index>(block);
        block += n01 * n;
      }
    }
  }
#pragma omp parallel for schedule(static) num_threads(threads_for(lane, layout.n_rows()))
  for (int64_t f = 1; f < layout.n_filters; ++f) {
    for (int64_t r = 0; r < per_filter; ++r) {
      crow[f * per_filter + r] = static_cast<Index>(crow[r] + f * block);
    }
  }
  crow[layout.n_rows()] = static_cast<Index>(layout.n_filters * block);
}

template <class Index>
void fill_columns(Cpu lane, Layout const& layout, Index const* start, Index* col) {
  int64_t const nnz = start[layout.n_rows()], n_input = layout.n_input();
  int64_t const per_filter = layout.rows_per_filter(),
                per_group = layout.n_filters / layout.n_groups;
  auto const step = static_cast<Index>(layout.axis[2].entry_step);
  parallel_rows(layout, threads_for(lane, nnz), [&](int64_t begin, int64_t end) {
    Pages<Index> pages(col + start[begin], col + start[end]);
    for_each_row(layout, begin, end, [&](int64_t index, Row const& row) {
      int64_t const n = start[index + 1] - start[index];
      if (n == 0) return;
      Index* out = col + start[index];
      pages.reach(out + n);
      // The filter before, if it is of the same group, has the same columns: copy what is there.
      int64_t const twin = index - per_filter;
      if (twin >= begin && row.filter % per_group != 0 && start[twin + 1] - start[twin] == n) {
        std::copy_n(col + start[twin], n, out);
        return;
      }
      Box const box = box_of(layout, row);
      for_each_line(layout, box, 0, [&](int64_t column, int64_t, int64_t length) {
        auto const first = static_cast<Index>(column);
        for (int64_t j = 0; j < length; ++j) out[j] = first + static_cast<Index>(j) * step;
        out += length;
      });
      // Each further plane is the one before it, moved on by one channel or sample.
      for (int64_t j = box.per_plane; j < n; ++j, ++out) {
        *out = out[-box.per_plane] + static_cast<Index>(n_input);
      }
    });
  });
}

template <class Real, class Index>
void fill_values(Cpu lane, Layout const& layout, Index const* start, Real const* source,
                 Real* values) {
  Axis const* axis = layout.axis;
  int64_t const nnz = start[layout.n_rows()];
  auto const fill_row = [&](int64_t index, Row const& row) {
    if (start[index] == start[index + 1]) return;
    Box const box = box_of(layout, row);
    // `run` entries stand side by side in the source: the more axes are whole, the more of them.
    int64_t n_planes = layout.n_planes, n0 = box.range[0].size(), n1 = box.range[1].size();
    int64_t run = box.range[2].size();
    if (run == axis[2].n_entries) run *= std::exchange(n1, 1);
    if (run == axis[1].n_entries * axis[2].n_entries) run *= std::exchange(n0, 1);
    if (run == layout.plane_stride) run *= std::exchange(n_planes, 1);
    Real* __restrict out = values + start[index];
    for (int64_t plane = 0; plane < n_planes; ++plane) {
      for (int64_t e0 = box.range[0].begin; e0 < box.range[0].begin + n0; ++e0) {
        Real const* from =
            source + source_of(layout, box, plane, e0, box.range[1].begin, box.range[2].begin);
        for (int64_t line = 0; line < n1; ++line, from += axis[2].n_entries, out += run) {
          copy_run(from, run, out);
        }
      }
    }
  };
  parallel_rows(layout, threads_for(lane, nnz), [&](int64_t begin, int64_t end) {
    Pages<Real> pages(values + start[begin], values + start[end]);
    for_each_row(layout, begin, end, [&](int64_t index, Row const& row) {
      pages.reach(values + start[index + 1]);
      fill_row(index, row);
    });
  });
}

template <class Real, class Index>
void sum_values(Cpu lane, Layout const& layout, Index const* start, Real const* values,
                Real* source) {
  int64_t const per_filter = layout.rows_per_filter(), n_sums = layout.n_filters * layout.n_planes;
#pragma omp parallel for schedule(static) num_threads(threads_for(lane, start[layout.n_rows()]))
  for (int64_t s = 0; s < n_sums; ++s) {
    // One filter and plane: the sums of its entries belong to this thread alone.
    int64_t const filter = s / layout.n_planes, plane = s % layout.n_planes;
    int64_t const base = filter * layout.filter_stride + plane * layout.plane_stride;
    std::fill_n(source + base, layout.entries_per_plane(), Real(0));
    for_each_row(layout, filter * per_filter, (filter + 1) * per_filter,
                 [&](int64_t index, Row const& row) {
                   if (start[index] == start[index + 1]) return;
                   Box const box = box_of(layout, row);
                   Real const* from = values + start[index] + plane * box.per_plane;
                   for_each_line(layout, box, plane, [&](int64_t, int64_t first, int64_t length) {
                     for (int64_t j = 0; j < length; ++j) source[first + j] += from[j];
                     from += length;
                   });
                 });
  }
}

template <class Real, class Index>
void count_nonzeros(Cpu lane, Layout const& layout, Real const* source, Index* counts) {
  auto const count_row = [&](int64_t index, Row const& row) {
    Box const box = box_of(layout, row);
    Index count = 0;
    for (int64_t plane = 0; plane < layout.n_planes; ++plane) {
      for_each_line(layout, box, plane, [&](int64_t, int64_t first, int64_t length) {
        for (int64_t j = 0; j < length; ++j) count += source[first + j] != Real(0);
      });
    }
    counts[index] = count;
  };
  parallel_rows(layout, threads_for(lane, layout.nnz()),
                [&](int64_t begin, int64_t end) { for_each_row(layout, begin, end, count_row); });
}

template <class Real, class Index>
void fill_nonzeros(Cpu lane, Layout const& layout, Index const* start, Real const* source,
                   Index* col, Index* origin) {
  auto const step = static_cast<Index>(layout.axis[2].entry_step);
  auto const fill_row = [&](int64_t index, Row const& row) {
    Box const box = box_of(layout, row);
    Index out = start[index];
    Index const end = start[index + 1];
    for (int64_t plane = 0; plane < layout.n_planes; ++plane) {
      for_each_line(layout, box, plane, [&](int64_t column, int64_t first, int64_t length) {
        // Zeros come without order, so no branch on them: write, and move on if it was to be kept.
        for (int64_t j = 0; j < length && out < end; ++j) {
          col[out] = static_cast<Index>(column) + static_cast<Index>(j) * step;
          origin[out] = static_cast<Index>(first + j);
          out += source[first + j] != Real(0);
        }
      });
    }
  };
  parallel_rows(layout, threads_for(lane, layout.nnz()), [&](int64_t begin, int64_t end) {
    Pages<Index> col_pages(col + start[begin], col + start[end]);
    Pages<Index> origin_pages(origin + start[begin], origin + start[end]);
    for_each_row(layout, begin, end, [&](int64_t index, Row const& row) {
      col_pages.reach(col + start[index + 1]);
      origin_pages.reach(origin + start[index + 1]);
      fill_row(index, row);
    });
  });
}

RCONV_INSTANTIATE_ALL(Cpu)

}  // namespace rconv
