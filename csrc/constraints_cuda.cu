// SPDX-License-Identifier: Apache-2.0
#include <algorithm>

#include "cuda_check.cuh"
#include "kernels.hpp"

namespace rconv {
namespace {

constexpr int kWarp = 32;
constexpr int kWarpsPerBlock = 4;
// A warp works out where its row lies once, then writes this many entries (32 for each lane).
constexpr int64_t kEntriesPerWarp = 1024;

cudaStream_t stream_of(Cuda lane) { return static_cast<cudaStream_t>(lane.stream); }

// One warp a row, and several where rows are long: neighbouring lanes write neighbouring entries.
dim3 warps_for(int64_t n_rows, int64_t entries_per_row) {
  int64_t const parts = (entries_per_row + kEntriesPerWarp - 1) / kEntriesPerWarp;
  return dim3(static_cast<unsigned>((n_rows + kWarpsPerBlock - 1) / kWarpsPerBlock),
              static_cast<unsigned>(std::clamp<int64_t>(parts, 1, 65535)));
}
dim3 const kBlock(kWarp, kWarpsPerBlock);

__device__ int64_t warp_row() { return int64_t(blockIdx.x) * kWarpsPerBlock + threadIdx.y; }

struct Entry {
  int64_t plane, e0, e1, e2;
};

// Entry `m` of a row. Index is wide enough for m, and 32-bit divisions are several times faster.
template <class Index>
__device__ Entry entry_of(Box const& box, Index m) {
  Index const n1 = static_cast<Index>(box.range[1].size());
  Index const n2 = static_cast<Index>(box.range[2].size());
  Index const per_plane = static_cast<Index>(box.per_plane);
  Index const plane = m / per_plane, in_plane = m - plane * per_plane;
  Index const line = in_plane / n2, in_line = in_plane - line * n2;
  Index const e0 = line / n1, e1 = line - e0 * n1;
  return {plane, box.range[0].begin + e0, box.range[1].begin + e1, box.range[2].begin + in_line};
}

// Calls store(position, box, entry) for every entry of the rows that are kept.
template <class Index, class Store>
__device__ void for_each_entry(Layout const& layout, Index const* start, Store&& store) {
  int64_t const index = warp_row();
  if (index >= layout.n_rows()) return;
  Index const begin = start[index], n = start[index + 1] - begin;
  if (n == 0) return;
  Box const box = box_of(layout, layout.row(index));
  for (int64_t m = int64_t(blockIdx.y) * kWarp + threadIdx.x; m < n;
       m += int64_t(gridDim.y) * kWarp) {
    store(begin + m, box, entry_of(box, static_cast<Index>(m)));
  }
}

template <class Index>
__global__ void fill_offsets_kernel(Layout layout, Index* crow) {
  int64_t const r = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  int64_t const per_filter = layout.rows_per_filter();
  if (r >= per_filter) return;
  int64_t const first = layout.offset(layout.row(r)), block = layout.offset({1, {0, 0, 0}});
  for (int64_t f = 0; f < layout.n_filters; ++f) {
    crow[f * per_filter + r] = static_cast<Index>(first + f * block);
  }
  if (r == 0) crow[layout.n_rows()] = static_cast<Index>(layout.n_filters * block);
}

template <class Index>
__global__ void fill_columns_kernel(Layout layout, Index const* start, Index* col) {
  for_each_entry(layout, start, [&](int64_t j, Box const& box, Entry const& e) {
    col[j] = static_cast<Index>(column_of(layout, box, e.plane, e.e0, e.e1, e.e2));
  });
}

template <class Real, class Index>
__global__ void fill_values_kernel(Layout layout, Index const* start, Real const* source,
                                   Real* values) {
  for_each_entry(layout, start, [&](int64_t j, Box const& box, Entry const& e) {
    values[j] = source[source_of(layout, box, e.plane, e.e0, e.e1, e.e2)];
  });
}

// One thread a source element: it visits the rows that read the element, in ascending order.
template <class Real, class Index>
__global__ void sum_values_kernel(Layout layout, Index const* start, Real const* values,
                                  Real* source) {
  int64_t const m = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (m >= layout.n_source()) return;
  Axis const* axis = layout.axis;
  int64_t const per_plane = layout.entries_per_plane();
  int64_t const block = m / per_plane, in_plane = m % per_plane;
  bool const planes_outside = layout.plane_stride > layout.filter_stride;
  int64_t const filter = planes_outside ? block % layout.n_filters : block / layout.n_planes;
  int64_t const plane = planes_outside ? block / layout.n_filters : block % layout.n_planes;
  int64_t const e[kAxes] = {in_plane / axis[2].n_entries / axis[1].n_entries,
                            in_plane / axis[2].n_entries % axis[1].n_entries,
                            in_plane % axis[2].n_entries};
  Range const rows[kAxes] = {axis[0].rows_of(e[0]), axis[1].rows_of(e[1]), axis[2].rows_of(e[2])};
  Real sum = 0;
  for (int64_t r0 = rows[0].begin; r0 < rows[0].end; ++r0) {
    Range const b0 = axis[0].entries_of(r0);
    for (int64_t r1 = rows[1].begin; r1 < rows[1].end; ++r1) {
      Range const b1 = axis[1].entries_of(r1);
      for (int64_t r2 = rows[2].begin; r2 < rows[2].end; ++r2) {
        int64_t const index =
            ((filter * axis[0].n_rows + r0) * axis[1].n_rows + r1) * axis[2].n_rows + r2;
        if (start[index] == start[index + 1]) continue;
        Range const b2 = axis[2].entries_of(r2);
        int64_t const line = (plane * b0.size() + e[0] - b0.begin) * b1.size() + e[1] - b1.begin;
        sum += values[start[index] + line * b2.size() + e[2] - b2.begin];
      }
    }
  }
  source[m] = sum;
}

// Walks a row with a whole warp, 32 entries at a time. visit(position among the nonzeros, box,
// entry, source index) is called by the lanes whose source is not 0; returns how many there were.
template <class Index, class Real, class Visit>
__device__ int64_t for_each_nonzero(Layout const& layout, int64_t index, Real const* source,
                                    Visit&& visit) {
  Box const box = box_of(layout, layout.row(index));
  int64_t const n = layout.n_planes * box.per_plane;
  int64_t found = 0;
  for (int64_t first = 0; first < n; first += kWarp) {
    int64_t const m = first + threadIdx.x;
    Entry e{};
    int64_t from = 0;
    bool keep = false;
    if (m < n) {
      e = entry_of(box, static_cast<Index>(m));
      from = source_of(layout, box, e.plane, e.e0, e.e1, e.e2);
      keep = source[from] != Real(0);
    }
    unsigned const kept = __ballot_sync(~0u, keep);
    if (keep) visit(found + __popc(kept & ((1u << threadIdx.x) - 1)), box, e, from);
    found += __popc(kept);
  }
  return found;
}

template <class Real, class Index>
__global__ void count_nonzeros_kernel(Layout layout, Real const* source, Index* counts) {
  int64_t const index = warp_row();
  if (index >= layout.n_rows()) return;
  int64_t const found = for_each_nonzero<Index>(layout, index, source,
                                                [](int64_t, Box const&, Entry const&, int64_t) {});
  if (threadIdx.x == 0) counts[index] = static_cast<Index>(found);
}

template <class Real, class Index>
__global__ void fill_nonzeros_kernel(Layout layout, Index const* start, Real const* source,
                                     Index* col, Index* origin) {
  int64_t const index = warp_row();
  if (index >= layout.n_rows()) return;
  int64_t const begin = start[index];
  for_each_nonzero<Index>(
      layout, index, source, [&](int64_t j, Box const& box, Entry const& e, int64_t from) {
        col[begin + j] = static_cast<Index>(column_of(layout, box, e.plane, e.e0, e.e1, e.e2));
        origin[begin + j] = static_cast<Index>(from);
      });
}

constexpr int kThreads = 256;
unsigned blocks_for(int64_t n) { return static_cast<unsigned>((n + kThreads - 1) / kThreads); }

}  // namespace

template <class Index>
void fill_offsets(Cuda lane, Layout const& layout, Index* crow) {
  fill_offsets_kernel<<<blocks_for(layout.rows_per_filter()), kThreads, 0, stream_of(lane)>>>(
      layout, crow);
  check_launch("fill_offsets_kernel");
}

template <class Index>
void fill_columns(Cuda lane, Layout const& layout, Index const* start, Index* col) {
  dim3 const grid = warps_for(layout.n_rows(), layout.nnz() / layout.n_rows());
  fill_columns_kernel<<<grid, kBlock, 0, stream_of(lane)>>>(layout, start, col);
  check_launch("fill_columns_kernel");
}

template <class Real, class Index>
void fill_values(Cuda lane, Layout const& layout, Index const* start, Real const* source,
                 Real* values) {
  dim3 const grid = warps_for(layout.n_rows(), layout.nnz() / layout.n_rows());
  fill_values_kernel<<<grid, kBlock, 0, stream_of(lane)>>>(layout, start, source, values);
  check_launch("fill_values_kernel");
}

template <class Real, class Index>
void sum_values(Cuda lane, Layout const& layout, Index const* start, Real const* values,
                Real* source) {
  sum_values_kernel<<<blocks_for(layout.n_source()), kThreads, 0, stream_of(lane)>>>(
      layout, start, values, source);
  check_launch("sum_values_kernel");
}

template <class Real, class Index>
void count_nonzeros(Cuda lane, Layout const& layout, Real const* source, Index* counts) {
  count_nonzeros_kernel<<<warps_for(layout.n_rows(), 0), kBlock, 0, stream_of(lane)>>>(
      layout, source, counts);
  check_launch("count_nonzeros_kernel");
}

template <class Real, class Index>
void fill_nonzeros(Cuda lane, Layout const& layout, Index const* start, Real const* source,
                   Index* col, Index* origin) {
  fill_nonzeros_kernel<<<warps_for(layout.n_rows(), 0), kBlock, 0, stream_of(lane)>>>(
      layout, start, source, col, origin);
  check_launch("fill_nonzeros_kernel");
}

RCONV_INSTANTIATE_ALL(Cuda)

}  // namespace rconv
