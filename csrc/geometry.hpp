// SPDX-License-Identifier: Apache-2.0
// The whole arithmetic of the constraint matrices of a convolution, for OpenMP and CUDA alike.
//
// Output position u and kernel offset k meet input position i = u*s + k*d - p on each axis. Both
// matrices have one row per (filter, r) and one entry per (plane, e) with 0 <= i < size, where
//
//   matrix                rows r       entries e    planes           source of the values
//   gradient constraints  offsets k    outputs u    samples b        g[b, f, u]
//   weight constraints    outputs u    offsets k    channels c       W[f, c, k]
//
// so the one is the other with (u, s) and (k, d) exchanged, and all code below serves both:
// i = r*row_step + e*entry_step - padding. Walking (plane, e) in order gives sorted columns without
// duplicates, because each e hits another i.
#pragma once

#include <cstdint>
#include <type_traits>

#if defined(__CUDACC__)
#define RCONV_HD __host__ __device__ __forceinline__
#define RCONV_ROLLED _Pragma("unroll 1")  // unrolled it would not fit the instruction cache
#else
#define RCONV_HD inline
#define RCONV_ROLLED
#endif

namespace rconv {

constexpr int kAxes = 3;  // 1-D and 2-D get leading axes of size 1

// Int is int64_t, or int32_t where the caller checked that every count, column and position fits
// (ConstraintLayout.index_dtype): a GPU has no 64-bit arithmetic.
template <class Int>
struct BasicRange {
  Int begin, end;
  RCONV_HD Int size() const { return end - begin; }
};

// n / d for n >= 0. Most strides, dilations and group counts are 1, many n are smaller than d, and
// a division takes as long as writing a short row.
template <class Int>
RCONV_HD Int quotient(Int n, Int d) {
  using Word = std::make_unsigned_t<Int>;  // without a sign it is shorter
  return d == 1 ? n : n < d ? 0 : static_cast<Int>(Word(n) / Word(d));
}

// The j in [0, count) with 0 <= offset + j*step < size, for step >= 1.
template <class Int>
RCONV_HD BasicRange<Int> meeting(Int offset, Int step, Int count, Int size) {
  Int begin = offset >= 0 ? 0 : quotient(step - 1 - offset, step);
  Int end = offset >= size ? 0 : quotient(size - 1 - offset, step) + 1;
  end = end < count ? end : count;
  return {begin < end ? begin : end, end};
}

template <class Int>
struct BasicAxis {
  Int size, n_rows, row_step, n_entries, entry_step, padding;

  RCONV_HD Int position(Int r, Int e) const { return r * row_step + e * entry_step - padding; }
  RCONV_HD BasicRange<Int> entries_of(Int r) const {
    return meeting(r * row_step - padding, entry_step, n_entries, size);
  }
  RCONV_HD BasicRange<Int> rows_of(Int e) const {
    return meeting(e * entry_step - padding, row_step, n_rows, size);
  }
  // Entries in the rows before r: summed along the shorter side, which a kernel has few of.
  RCONV_HD Int entries_before(Int r) const {
    Int sum = 0;
    if (r <= n_entries) {
      RCONV_ROLLED
      for (Int j = 0; j < r; ++j) sum += entries_of(j).size();
    } else {
      RCONV_ROLLED
      for (Int e = 0; e < n_entries; ++e) {
        BasicRange<Int> const rows = rows_of(e);
        Int const end = rows.end < r ? rows.end : r;
        sum += end > rows.begin ? end - rows.begin : 0;
      }
    }
    return sum;
  }
};

// One row of the matrix: a box of entries in each plane.
template <class Int>
struct BasicRow {
  Int filter, r[kAxes];
};

// How far a position moves with each index of an entry.
template <class Int>
struct BasicSteps {
  Int plane, e[kAxes];
  RCONV_HD Int at(Int p, Int e0, Int e1, Int e2) const {
    return p * plane + e0 * e[0] + e1 * e[1] + e2 * e[2];
  }
};

template <class Int>
struct BasicLayout {
  Int n_filters, n_planes;
  Int n_groups;                     // filters of group q start at column q*n_planes*n_input()
  Int filter_stride, plane_stride;  // of the source, whose entries are contiguous
  BasicAxis<Int> axis[kAxes];

  RCONV_HD Int n_input() const { return axis[0].size * axis[1].size * axis[2].size; }
  RCONV_HD Int rows_per_filter() const { return axis[0].n_rows * axis[1].n_rows * axis[2].n_rows; }
  RCONV_HD Int entries_per_plane() const {
    return axis[0].n_entries * axis[1].n_entries * axis[2].n_entries;
  }
  RCONV_HD Int n_rows() const { return n_filters * rows_per_filter(); }
  RCONV_HD Int n_source() const { return n_filters * n_planes * entries_per_plane(); }
  RCONV_HD BasicSteps<Int> column_steps() const {
    Int const line = axis[2].size, plane = axis[1].size * line;
    return {n_input(), {axis[0].entry_step * plane, axis[1].entry_step * line, axis[2].entry_step}};
  }
  RCONV_HD BasicSteps<Int> source_steps() const {
    return {plane_stride, {axis[1].n_entries * axis[2].n_entries, axis[2].n_entries, 1}};
  }

  RCONV_HD BasicRow<Int> row(Int index) const {
    Int const rest2 = quotient(index, axis[2].n_rows), r2 = index - rest2 * axis[2].n_rows;
    Int const rest1 = quotient(rest2, axis[1].n_rows), r1 = rest2 - rest1 * axis[1].n_rows;
    Int const filter = quotient(rest1, axis[0].n_rows), r0 = rest1 - filter * axis[0].n_rows;
    return {filter, {r0, r1, r2}};
  }
  // With n the entries of a row on an axis, P their sum over the rows before, T over all rows:
  // offset(f, r) = n_planes * (f T0 T1 T2 + P0 T1 T2 + n0 (P1 T2 + n1 P2)).
  // row r = n_rows on the first axis is allowed: it stands for the end.
  RCONV_HD Int offset(BasicRow<Int> const& row) const {
    Int n[kAxes], p[kAxes], t[kAxes];
    for (int a = 0; a < kAxes; ++a) {
      n[a] = axis[a].entries_of(row.r[a]).size();
      p[a] = axis[a].entries_before(row.r[a]);
      t[a] = axis[a].entries_before(axis[a].n_rows);
    }
    return n_planes *
           ((row.filter * t[0] + p[0]) * t[1] * t[2] + n[0] * (p[1] * t[2] + n[1] * p[2]));
  }
  RCONV_HD Int nnz() const { return offset({n_filters, {0, 0, 0}}); }
};

// The entries of one row: ranges of e per axis, the same in each plane.
template <class Int>
struct BasicBox {
  BasicRange<Int> range[kAxes];
  Int column, source;  // of plane 0 and e = 0; the column may be negative there
  Int per_plane;       // entries in one plane
};

template <class Int>
RCONV_HD BasicBox<Int> box_of(BasicLayout<Int> const& layout, BasicRow<Int> const& row) {
  BasicAxis<Int> const* axis = layout.axis;
  BasicBox<Int> box;
  Int position = 0;
  box.per_plane = 1;
  for (int a = 0; a < kAxes; ++a) {
    box.range[a] = axis[a].entries_of(row.r[a]);
    box.per_plane *= box.range[a].size();
    position = position * axis[a].size + axis[a].position(row.r[a], 0);
  }
  Int const group =
      layout.n_groups == 1 ? 0 : quotient(row.filter, layout.n_filters / layout.n_groups);
  box.column = group * layout.n_planes * layout.n_input() + position;
  box.source = row.filter * layout.filter_stride;
  return box;
}

// Column and source index of entry e = (e0, e1, e2) of a plane.
template <class Int>
RCONV_HD Int column_of(BasicLayout<Int> const& layout, BasicBox<Int> const& box, Int plane, Int e0,
                       Int e1, Int e2) {
  return box.column + layout.column_steps().at(plane, e0, e1, e2);
}
template <class Int>
RCONV_HD Int source_of(BasicLayout<Int> const& layout, BasicBox<Int> const& box, Int plane, Int e0,
                       Int e1, Int e2) {
  return box.source + layout.source_steps().at(plane, e0, e1, e2);
}

using Axis = BasicAxis<int64_t>;
using Row = BasicRow<int64_t>;
using Layout = BasicLayout<int64_t>;
using Box = BasicBox<int64_t>;

}  // namespace rconv
