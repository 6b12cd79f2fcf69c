// SPDX-License-Identifier: Apache-2.0
// What the kernels promise. Each comes once for the CPU and once for CUDA, told apart by the lane.
//
// All pointers are to memory on the lane's device, allocated by the caller; nothing here allocates
// what it returns or waits for the device. Every array is written in full. Results do not depend on
// the number of threads and are bit-equal on both lanes: there are no atomics, and sums run over
// the rows in ascending order.
//
// Index is int32_t or int64_t; the caller checked that nnz and the columns fit. Real is float or
// double. `start` [n_rows + 1] holds each row's first position in the entries; where start[r] ==
// start[r + 1] for a row that meets inputs, the row is left out (a masked output).
#pragma once

#include "geometry.hpp"

namespace rconv {

struct Cpu {
  int n_threads;
};
struct Cuda {
  void* stream;  // a cudaStream_t; the caller has made its device current
};

// crow[r] = first entry of row r, crow[n_rows] = nnz, when every row is kept. Closed form, no scan.
template <class Index>
void fill_offsets(Cpu, Layout const&, Index* crow /*[n_rows + 1]*/);
template <class Index>
void fill_offsets(Cuda, Layout const&, Index* crow /*[n_rows + 1]*/);

// col[j] = column of entry j: sorted in each row, no duplicates.
template <class Index>
void fill_columns(Cpu, Layout const&, Index const* start, Index* col /*[nnz]*/);
template <class Index>
void fill_columns(Cuda, Layout const&, Index const* start, Index* col /*[nnz]*/);

// values[j] = the source element of entry j.
template <class Real, class Index>
void fill_values(Cpu, Layout const&, Index const* start, Real const* source /*[n_source]*/,
                 Real* values /*[nnz]*/);
template <class Real, class Index>
void fill_values(Cuda, Layout const&, Index const* start, Real const* source /*[n_source]*/,
                 Real* values /*[nnz]*/);

// source[m] = sum of values[j] over the entries j that fill_values reads from m: its transpose.
// A gather over the rows that meet m, so an element no entry reads becomes 0.
template <class Real, class Index>
void sum_values(Cpu, Layout const&, Index const* start, Real const* values /*[nnz]*/,
                Real* source /*[n_source]*/);
template <class Real, class Index>
void sum_values(Cuda, Layout const&, Index const* start, Real const* values /*[nnz]*/,
                Real* source /*[n_source]*/);

// counts[r] = entries of row r whose source is not 0 (NaN is not 0).
template <class Real, class Index>
void count_nonzeros(Cpu, Layout const&, Real const* source, Index* counts /*[n_rows]*/);
template <class Real, class Index>
void count_nonzeros(Cuda, Layout const&, Real const* source, Index* counts /*[n_rows]*/);

// Columns and source indices of those entries; `start` is the exclusive sum of the counts.
template <class Real, class Index>
void fill_nonzeros(Cpu, Layout const&, Index const* start, Real const* source, Index* col /*[nnz]*/,
                   Index* origin /*[nnz]*/);
template <class Real, class Index>
void fill_nonzeros(Cuda, Layout const&, Index const* start, Real const* source,
                   Index* col /*[nnz]*/, Index* origin /*[nnz]*/);

// Instantiates each function above for a lane; used at the end of the lane's own file.
#define RCONV_INSTANTIATE_INDEX(Lane, Index)               \
  template void fill_offsets(Lane, Layout const&, Index*); \
  template void fill_columns(Lane, Layout const&, Index const*, Index*);
#define RCONV_INSTANTIATE(Lane, Real, Index)                                        \
  template void fill_values(Lane, Layout const&, Index const*, Real const*, Real*); \
  template void sum_values(Lane, Layout const&, Index const*, Real const*, Real*);  \
  template void count_nonzeros(Lane, Layout const&, Real const*, Index*);           \
  template void fill_nonzeros(Lane, Layout const&, Index const*, Real const*, Index*, Index*);
#define RCONV_INSTANTIATE_ALL(Lane)        \
  RCONV_INSTANTIATE_INDEX(Lane, int32_t)   \
  RCONV_INSTANTIATE_INDEX(Lane, int64_t)   \
  RCONV_INSTANTIATE(Lane, float, int32_t)  \
  RCONV_INSTANTIATE(Lane, float, int64_t)  \
  RCONV_INSTANTIATE(Lane, double, int32_t) \
  RCONV_INSTANTIATE(Lane, double, int64_t)

}  // namespace rconv
