// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <type_traits>

#include "cuda_check.cuh"
#include "kernels.hpp"

namespace rconv {
namespace {

constexpr int kWarp = 32;
constexpr int kThreads = 128;
// Finding where a row lies takes a thread about as long as writing this many entries.
constexpr int64_t kEntriesPerThread = 16;
// Fewer neighbours than this would write less than half a sector of memory together.
constexpr int kFewestLanes = 4;
constexpr unsigned kMaxGridY = 65535;

cudaStream_t stream_of(Cuda lane) { return static_cast<cudaStream_t>(lane.stream); }

unsigned blocks_for(int64_t n_threads) {
  return static_cast<unsigned>((n_threads + kThreads - 1) / kThreads);
}

// `lanes` neighbouring threads share a row and write neighbouring entries; long rows are shared by
// several warps, along the grid's y.
struct Shape {
  int lanes;
  dim3 grid;
};
Shape shape_for(Layout const& layout) {
  int64_t const entries = std::max<int64_t>(1, layout.nnz() / layout.n_rows());
  int lanes = kWarp;
  while (lanes > kFewestLanes && lanes * kEntriesPerThread > entries) lanes /= 2;
  int64_t const parts = entries / (lanes * kEntriesPerThread);
  return {lanes, dim3(blocks_for(layout.n_rows() * lanes),
                      static_cast<unsigned>(std::clamp<int64_t>(parts, 1, kMaxGridY)))};
}

__device__ int64_t thread_index() { return int64_t(blockIdx.x) * kThreads + threadIdx.x; }

template <class Int>
BasicLayout<Int> narrowed(Layout const& l) {
  auto const n = [](int64_t value) { return static_cast<Int>(value); };
  BasicLayout<Int> to{n(l.n_filters),     n(l.n_planes),     n(l.n_groups),
                      n(l.filter_stride), n(l.plane_stride), {}};
  for (int a = 0; a < kAxes; ++a) {
    Axis const& x = l.axis[a];
    to.axis[a] = {n(x.size),      n(x.n_rows),     n(x.row_step),
                  n(x.n_entries), n(x.entry_step), n(x.padding)};
  }
  return to;
}

// Entry number `first` of a row, then every `stride`-th one. The indices (plane, e0, e1, e2),
// counted from the box's corner, are the digits of the number, the box's sizes their radices: to
// add the digits of the stride, with carries, takes no division.
template <class Int>
struct Cursor {
  Int size[kAxes], digit[kAxes], stride[kAxes];
  Int plane, stride_plane;
  bool carry[kAxes];

  __device__ Cursor(BasicBox<Int> const& box, Int first, Int by) {
    for (int a = 0; a < kAxes; ++a) size[a] = box.range[a].size();
    plane = split(first, digit);
    stride_plane = split(by, stride);
  }
  __device__ void advance() {
    bool carried = false;
    for (int a = kAxes - 1; a >= 0; --a) {
      digit[a] += stride[a] + carried;
      carried = carry[a] = digit[a] >= size[a];
      if (carried) digit[a] -= size[a];
    }
  }

 private:
  __device__ Int split(Int number, Int (&digits)[kAxes]) const {
    for (int a = kAxes - 1; a >= 0; --a) {
      Int const rest = quotient(number, size[a]);
      digits[a] = number - rest * size[a];
      number = rest;
    }
    return number;
  }
};

// A position in an array, `origin` for plane 0 and e = 0, that moves by `steps` with the indices of
// a cursor. On the way it may leave the array, so it is counted without a sign, which may wrap.
template <class Int>
struct Track {
  using Word = std::make_unsigned_t<Int>;
  Word at, stride, carried[kAxes];

  __device__ Track(Cursor<Int> const& c, BasicBox<Int> const& box, BasicSteps<Int> const& steps,
                   Int origin)
      : at(origin + Word(c.plane) * Word(steps.plane)),
        stride(Word(c.stride_plane) * Word(steps.plane)) {
    for (int a = 0; a < kAxes; ++a) {
      Word const step = steps.e[a], up = a > 0 ? steps.e[a - 1] : steps.plane;
      at += Word(box.range[a].begin + c.digit[a]) * step;
      stride += Word(c.stride[a]) * step;
      carried[a] = up - Word(c.size[a]) * step;
    }
  }
  __device__ void advance(Cursor<Int> const& c) {
    at += stride;
    for (int a = 0; a < kAxes; ++a) {
      if (c.carry[a]) at += carried[a];
    }
  }
};

template <class Int>
__device__ Track<Int> columns(BasicLayout<Int> const& layout, BasicBox<Int> const& box,
                              Cursor<Int> const& cursor) {
  return {cursor, box, layout.column_steps(), box.column};
}
template <class Int>
__device__ Track<Int> sources(BasicLayout<Int> const& layout, BasicBox<Int> const& box,
                              Cursor<Int> const& cursor) {
  return {cursor, box, layout.source_steps(), box.source};
}

// Calls store(j, position) for every entry j of the rows that are kept, with its position on the
// track that track_of(layout, box, cursor) lays.
template <class Index, class TrackOf, class Store>
__device__ void for_each_entry(BasicLayout<Index> const& layout, int lanes, Index const* start,
                               TrackOf&& track_of, Store&& store) {
  int64_t const row = thread_index() / lanes;
  if (row >= layout.n_rows()) return;
  auto const index = static_cast<Index>(row);
  Index const begin = start[index], end = start[index + 1];
  auto const first = static_cast<Index>(blockIdx.y * lanes + threadIdx.x % lanes);
  auto const stride = static_cast<Index>(gridDim.y * lanes);
  if (first >= end - begin) return;
  BasicBox<Index> const box = box_of(layout, layout.row(index));
  Cursor<Index> cursor(box, first, stride);
  Track<Index> track = track_of(layout, box, cursor);
  for (Index j = begin + first;; j += stride) {
    store(j, track.at);
    if (end - j <= stride) return;
    cursor.advance();
    track.advance(cursor);
  }
}

// All filters have the same rows, shifted: a thread computes one and writes it for every
// gridDim.y-th.
template <class Index>
__global__ void fill_offsets_kernel(BasicLayout<Index> layout, Index* crow) {
  int64_t const thread = thread_index();
  Index const per_filter = layout.rows_per_filter();
  if (thread >= per_filter) return;
  auto const r = static_cast<Index>(thread);
  Index const first = layout.offset(layout.row(r)), block = layout.offset({1, {0, 0, 0}});
  for (Index f = blockIdx.y; f < layout.n_filters; f += gridDim.y) {
    crow[f * per_filter + r] = first + f * block;
  }
  if (thread == 0 && blockIdx.y == 0) crow[layout.n_rows()] = layout.n_filters * block;
}

template <class Index>
__global__ void fill_columns_kernel(BasicLayout<Index> layout, int lanes, Index const* start,
                                    Index* col) {
  for_each_entry(layout, lanes, start, columns<Index>,
                 [&](Index j, auto column) { col[j] = static_cast<Index>(column); });
}

template <class Real, class Index>
__global__ void fill_values_kernel(BasicLayout<Index> layout, int lanes, Index const* start,
                                   Real const* source, Real* values) {
  for_each_entry(layout, lanes, start, sources<Index>,
                 [&](Index j, auto from) { values[j] = source[from]; });
}

// One thread a source element: it visits the rows that read the element, in ascending order.
template <class Real, class Index>
__global__ void sum_values_kernel(BasicLayout<Index> layout, Index const* start, Real const* values,
                                  Real* source) {
  int64_t const thread = thread_index();
  if (thread >= layout.n_source()) return;
  auto const m = static_cast<Index>(thread);
  BasicAxis<Index> const* axis = layout.axis;
  Index const per_plane = layout.entries_per_plane();
  Index const block = m / per_plane, in_plane = m % per_plane;
  bool const planes_outside = layout.plane_stride > layout.filter_stride;
  Index const filter = planes_outside ? block % layout.n_filters : block / layout.n_planes;
  Index const plane = planes_outside ? block / layout.n_filters : block % layout.n_planes;
  Index const e[kAxes] = {in_plane / axis[2].n_entries / axis[1].n_entries,
                          in_plane / axis[2].n_entries % axis[1].n_entries,
                          in_plane % axis[2].n_entries};
  BasicRange<Index> const rows[kAxes] = {axis[0].rows_of(e[0]), axis[1].rows_of(e[1]),
                                         axis[2].rows_of(e[2])};
  Real sum = 0;
  for (Index r0 = rows[0].begin; r0 < rows[0].end; ++r0) {
    BasicRange<Index> const b0 = axis[0].entries_of(r0);
    for (Index r1 = rows[1].begin; r1 < rows[1].end; ++r1) {
      BasicRange<Index> const b1 = axis[1].entries_of(r1);
      for (Index r2 = rows[2].begin; r2 < rows[2].end; ++r2) {
        Index const index =
            ((filter * axis[0].n_rows + r0) * axis[1].n_rows + r1) * axis[2].n_rows + r2;
        if (start[index] == start[index + 1]) continue;
        BasicRange<Index> const b2 = axis[2].entries_of(r2);
        Index const line = (plane * b0.size() + e[0] - b0.begin) * b1.size() + e[1] - b1.begin;
        sum += values[start[index] + line * b2.size() + e[2] - b2.begin];
      }
    }
  }
  source[m] = sum;
}

// Walks a row with a whole warp, 32 entries at a time. visit(position among the nonzeros, column,
// source index) is called by the lanes whose source is not 0; returns how many there were.
template <class Index, class Real, class Visit>
__device__ Index for_each_nonzero(BasicLayout<Index> const& layout, Index index, Real const* source,
                                  Visit&& visit) {
  BasicBox<Index> const box = box_of(layout, layout.row(index));
  Index const n = layout.n_planes * box.per_plane;
  if (n == 0) return 0;
  unsigned const lane = threadIdx.x % kWarp;
  Cursor<Index> cursor(box, lane, kWarp);
  Track<Index> column = columns(layout, box, cursor), from = sources(layout, box, cursor);
  Index found = 0;
  for (Index left = n; left > 0; left -= kWarp) {
    bool const keep = Index(lane) < left && source[from.at] != Real(0);
    unsigned const kept = __ballot_sync(~0u, keep);
    if (keep) visit(found + __popc(kept & ((1u << lane) - 1)), column.at, from.at);
    found += __popc(kept);
    cursor.advance();
    column.advance(cursor);
    from.advance(cursor);
  }
  return found;
}

template <class Real, class Index>
__global__ void count_nonzeros_kernel(BasicLayout<Index> layout, Real const* source,
                                      Index* counts) {
  int64_t const row = thread_index() / kWarp;
  if (row >= layout.n_rows()) return;
  auto const index = static_cast<Index>(row);
  Index const found = for_each_nonzero(layout, index, source, [](Index, auto, auto) {});
  if (threadIdx.x % kWarp == 0) counts[index] = found;
}

template <class Real, class Index>
__global__ void fill_nonzeros_kernel(BasicLayout<Index> layout, Index const* start,
                                     Real const* source, Index* col, Index* origin) {
  int64_t const row = thread_index() / kWarp;
  if (row >= layout.n_rows()) return;
  auto const index = static_cast<Index>(row);
  Index const begin = start[index];
  for_each_nonzero(layout, index, source, [&](Index j, auto column, auto from) {
    col[begin + j] = static_cast<Index>(column);
    origin[begin + j] = static_cast<Index>(from);
  });
}

}  // namespace

template <class Index>
void fill_offsets(Cuda lane, Layout const& layout, Index* crow) {
  constexpr int64_t kCopies = 64;
  dim3 const grid(blocks_for(layout.rows_per_filter()),
                  static_cast<unsigned>(std::min(layout.n_filters, kCopies)));
  fill_offsets_kernel<<<grid, kThreads, 0, stream_of(lane)>>>(narrowed<Index>(layout), crow);
  check_launch("fill_offsets_kernel");
}

template <class Index>
void fill_columns(Cuda lane, Layout const& layout, Index const* start, Index* col) {
  Shape const shape = shape_for(layout);
  fill_columns_kernel<<<shape.grid, kThreads, 0, stream_of(lane)>>>(narrowed<Index>(layout),
                                                                    shape.lanes, start, col);
  check_launch("fill_columns_kernel");
}

template <class Real, class Index>
void fill_values(Cuda lane, Layout const& layout, Index const* start, Real const* source,
                 Real* values) {
  Shape const shape = shape_for(layout);
  fill_values_kernel<<<shape.grid, kThreads, 0, stream_of(lane)>>>(
      narrowed<Index>(layout), shape.lanes, start, source, values);
  check_launch("fill_values_kernel");
}

template <class Real, class Index>
void sum_values(Cuda lane, Layout const& layout, Index const* start, Real const* values,
                Real* source) {
  sum_values_kernel<<<blocks_for(layout.n_source()), kThreads, 0, stream_of(lane)>>>(
      narrowed<Index>(layout), start, values, source);
  check_launch("sum_values_kernel");
}

template <class Real, class Index>
void count_nonzeros(Cuda lane, Layout const& layout, Real const* source, Index* counts) {
  dim3 const grid(blocks_for(layout.n_rows() * kWarp));
  count_nonzeros_kernel<<<grid, kThreads, 0, stream_of(lane)>>>(narrowed<Index>(layout), source,
                                                                counts);
  check_launch("count_nonzeros_kernel");
}

template <class Real, class Index>
void fill_nonzeros(Cuda lane, Layout const& layout, Index const* start, Real const* source,
                   Index* col, Index* origin) {
  dim3 const grid(blocks_for(layout.n_rows() * kWarp));
  fill_nonzeros_kernel<<<grid, kThreads, 0, stream_of(lane)>>>(narrowed<Index>(layout), start,
                                                               source, col, origin);
  check_launch("fill_nonzeros_kernel");
}

RCONV_INSTANTIATE_ALL(Cuda)

}  // namespace rconv
