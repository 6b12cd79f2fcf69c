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

#if defined(__CUDACC__)
#define RCONV_HD __host__ __device__ __forceinline__
#else
#define RCONV_HD inline
#endif

namespace rconv {

constexpr int kAxes = 3;  // 1-D and 2-D get leading axes of size 1

struct Range {
  int64_t begin, end;
  RCONV_HD int64_t size() const { return end - begin; }
};

// n / d for n >= 0. Most strides, dilations and group counts are 1, and a division takes as long as
// writing a short row.
RCONV_HD int64_t quotient(int64_t n, int64_t d) { return d == 1 ? n : n / d; }

// The j in [0, count) with 0 <= offset + j*step < size, for step >= 1.
RCONV_HD Range meeting(int64_t offset, int64_t step, int64_t count, int64_t size) {
  int64_t begin = offset >= 0 ? 0 : quotient(step - 1 - offset, step);
  int64_t end = offset >= size ? 0 : quotient(size - 1 - offset, step) + 1;
  end = end < count ? end : count;
  return {begin < end ? begin : end, end};
}

struct Axis {
  int64_t size, n_rows, row_step, n_entries, entry_step, padding;

  RCONV_HD int64_t position(int64_t r, int64_t e) const {
    return r * row_step + e * entry_step - padding;
  }
  RCONV_HD Range entries_of(int64_t r) const {
    return meeting(r * row_step - padding, entry_step, n_entries, size);
  }
  RCONV_HD Range rows_of(int64_t e) const {
    return meeting(e * entry_step - padding, row_step, n_rows, size);
  }
  // Entries in the rows before r: summed along the shorter side, which a kernel has few of.
  RCONV_HD int64_t entries_before(int64_t r) const {
    int64_t sum = 0;
    if (r <= n_entries) {
      for (int64_t j = 0; j < r; ++j) sum += entries_of(j).size();
    } else {
      for (int64_t e = 0; e < n_entries; ++e) {
        Range const rows = rows_of(e);
        int64_t const end = rows.end < r ? rows.end : r;
        sum += end > rows.begin ? end - rows.begin : 0;
      }
    }
    return sum;
  }
};

// One row of the matrix: a box of entries in each plane.
struct Row {
  int64_t filter, r[kAxes];
};

struct Layout {
  int64_t n_filters, n_planes;
  int64_t n_groups;                     // filters of group q start at column q*n_planes*n_input()
  int64_t filter_stride, plane_stride;  // of the source, whose entries are contiguous
  Axis axis[kAxes];

  RCONV_HD int64_t n_input() const { return axis[0].size * axis[1].size * axis[2].size; }
  RCONV_HD int64_t rows_per_filter() const {
    return axis[0].n_rows * axis[1].n_rows * axis[2].n_rows;
  }
  RCONV_HD int64_t entries_per_plane() const {
    return axis[0].n_entries * axis[1].n_entries * axis[2].n_entries;
  }
  RCONV_HD int64_t n_rows() const { return n_filters * rows_per_filter(); }
  RCONV_HD int64_t n_source() const { return n_filters * n_planes * entries_per_plane(); }

  RCONV_HD Row row(int64_t index) const {
    int64_t const r2 = index % axis[2].n_rows, rest = index / axis[2].n_rows;
    int64_t const r1 = rest % axis[1].n_rows, rest1 = rest / axis[1].n_rows;
    return {rest1 / axis[0].n_rows, {rest1 % axis[0].n_rows, r1, r2}};
  }
  // With n the entries of a row on an axis, P their sum over the rows before, T over all rows:
  // offset(f, r) = n_planes * (f T0 T1 T2 + P0 T1 T2 + n0 (P1 T2 + n1 P2)).
  // row r = n_rows on the first axis is allowed: it stands for the end.
  RCONV_HD int64_t offset(Row const& row) const {
    int64_t const t0 = axis[0].entries_before(axis[0].n_rows);
    int64_t const t1 = axis[1].entries_before(axis[1].n_rows);
    int64_t const t2 = axis[2].entries_before(axis[2].n_rows);
    int64_t const n0 = axis[0].entries_of(row.r[0]).size();
    int64_t const n1 = axis[1].entries_of(row.r[1]).size();
    int64_t const p0 = axis[0].entries_before(row.r[0]);
    int64_t const p1 = axis[1].entries_before(row.r[1]);
    int64_t const p2 = axis[2].entries_before(row.r[2]);
    return n_planes * ((row.filter * t0 + p0) * t1 * t2 + n0 * (p1 * t2 + n1 * p2));
  }
  RCONV_HD int64_t nnz() const { return offset({n_filters, {0, 0, 0}}); }
};

// The entries of one row: ranges of e per axis, the same in each plane.
struct Box {
  Range range[kAxes];
  int64_t column, source;  // of plane 0 and e = 0; the column may be negative there
  int64_t per_plane;       // entries in one plane
};

RCONV_HD Box box_of(Layout const& layout, Row const& row) {
  Axis const* axis = layout.axis;
  Box box;
  int64_t position = 0;
  box.per_plane = 1;
  for (int a = 0; a < kAxes; ++a) {
    box.range[a] = axis[a].entries_of(row.r[a]);
    box.per_plane *= box.range[a].size();
    position = position * axis[a].size + axis[a].position(row.r[a], 0);
  }
  int64_t const group = layout.n_groups == 1 ? 0 : row.filter * layout.n_groups / layout.n_filters;
  box.column = group * layout.n_planes * layout.n_input() + position;
  box.source = row.filter * layout.filter_stride;
  return box;
}

// Column and source index of entry e = (e0, e1, e2) of a plane.
RCONV_HD int64_t column_of(Layout const& layout, Box const& box, int64_t plane, int64_t e0,
                           int64_t e1, int64_t e2) {
  Axis const* axis = layout.axis;
  int64_t const step =
      (e0 * axis[0].entry_step * axis[1].size + e1 * axis[1].entry_step) * axis[2].size +
      e2 * axis[2].entry_step;
  return box.column + plane * layout.n_input() + step;
}
RCONV_HD int64_t source_of(Layout const& layout, Box const& box, int64_t plane, int64_t e0,
                           int64_t e1, int64_t e2) {
  Axis const* axis = layout.axis;
  int64_t const e = (e0 * axis[1].n_entries + e1) * axis[2].n_entries + e2;
  return box.source + plane * layout.plane_stride + e;
}

}  // namespace rconv
