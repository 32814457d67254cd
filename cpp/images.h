// Images in C++, by the rules of lab/files.py: the same files give the same bytes as there.
//
// read_image(path, channels)       uint8 (H, W, channels): PNG, JPEG, PGM and PPM
// to_size(pixels, size)            stretched to the size that a network was trained at
// mask_to(mask, height, width)     classes brought back to the image's own size

#pragma once

#include <algorithm>
#include <cctype>
#include <cmath>
#include <csetjmp>
#include <cstdio>
#include <memory>
#include <numeric>
#include <stdexcept>
#include <string>
#include <vector>

#include <jpeglib.h>
#include <jerror.h>
#include <png.h>
#include <torch/torch.h>

using torch::Tensor;
using Error = std::runtime_error;

inline void check_pixels(int64_t height, int64_t width) {
    if (height * width > 1 << 26) throw Error("has more than 64 million pixels");
    if (std::max(height, width) > 65535) throw Error("has more than 65,535 pixels a side");
}

// ---- orientation ----

// Tag 0x0112 in the first directory of a TIFF header, else 0.
inline int exif_orientation(const std::string& exif) {
    const bool little = exif.starts_with("II");
    auto number = [&](size_t at, int bytes) {
        uint32_t value = 0;
        for (int i = 0; i < bytes && at + bytes <= exif.size(); i++)
            value |= uint32_t(uint8_t(exif[at + i])) << 8 * (little ? i : bytes - 1 - i);
        return value;
    };
    const uint32_t mark = number(2, 2);  // Pillow takes it in either order of bytes
    if (!little && !exif.starts_with("MM") || mark != 42 && mark != 42 << 8) return 0;
    const size_t directory = number(4, 4);
    for (uint32_t i = 0; i < number(directory, 2); i++) {
        const size_t entry = directory + 2 + 12 * i;
        if (number(entry, 2) != 0x0112) continue;
        const int kind = number(entry + 2, 2), bytes = kind == 3 ? 2 : kind == 4 ? 4 : 0;
        return number(entry + 4, 4) == 1 ? number(entry + 8, bytes) : 0;
    }
    return 0;
}

inline int xmp_orientation(const std::string& xmp) {
    const std::string name = "tiff:Orientation";
    for (size_t at = xmp.find(name); at != std::string::npos; at = xmp.find(name, at + 1)) {
        const std::string rest = xmp.substr(at + name.size(), 3);
        const size_t skip = rest.starts_with("=\"") ? 2 : rest.starts_with(">") ? 1 : 3;
        if (skip < rest.size() && std::isdigit(uint8_t(rest[skip]))) return rest[skip] - '0';
    }
    return 0;
}

// Turned by the orientation in EXIF (which may begin with its name), else by that in XMP.
inline Tensor upright(Tensor pixels, std::string exif, const std::string& xmp) {
    if (exif.starts_with("Exif")) exif.erase(0, 6);
    int orientation = exif_orientation(exif);
    if (!orientation) orientation = xmp_orientation(xmp);
    if (orientation >= 5 && orientation <= 8) pixels = pixels.transpose(0, 1);
    switch (orientation) {
        case 2: case 6: return pixels.flip(1).contiguous();
        case 3: case 7: return pixels.flip({0, 1}).contiguous();
        case 4: case 8: return pixels.flip(0).contiguous();
        default: return pixels.contiguous();
    }
}

// ---- PNG ----

struct PngTexts {
    std::string error, exif, xmp;
};

// The bytes of "\nexif\n  1234\n" and lines of hexadecimal digits, as some programs write EXIF.
inline std::string from_hex(const std::string& text) {
    std::string bytes, pair;
    int lines = 0;
    for (char c : text) {
        lines += c == '\n';
        if (lines >= 3 && std::isxdigit(uint8_t(c))) pair += c;
        if (pair.size() == 2) bytes += char(std::stoi(pair, nullptr, 16)), pair.clear();
    }
    return bytes;
}

inline Tensor read_png(FILE* file) {
    Tensor pixels;  // these before setjmp, so that the jump skips no constructor
    std::vector<png_bytep> rows;
    PngTexts found;
    png_structp png = png_create_read_struct(
        PNG_LIBPNG_VER_STRING, &found,
        [](png_structp png, png_const_charp message) {
            static_cast<PngTexts*>(png_get_error_ptr(png))->error = message;
            png_longjmp(png, 1);
        },
        [](png_structp, png_const_charp) {});
    png_infop info = png_create_info_struct(png);
    if (setjmp(png_jmpbuf(png))) {
        png_destroy_read_struct(&png, &info, nullptr);
        throw Error("cannot be read as an image (" + found.error + ")");
    }
    png_set_crc_action(png, PNG_CRC_DEFAULT, PNG_CRC_ERROR_QUIT);
    png_init_io(png, file);
    png_read_info(png, info);
    const int64_t height = png_get_image_height(png, info), width = png_get_image_width(png, info);
    check_pixels(height, width);
    // gamma and profiles change nothing, since nothing here asks for them
    png_set_expand(png);
    png_set_strip_16(png);  // the high byte
    png_set_strip_alpha(png);
    png_set_interlace_handling(png);
    png_read_update_info(png, info);
    pixels = torch::empty({height, width, png_get_channels(png, info)}, torch::kUInt8);
    for (int64_t y = 0; y < height; y++) rows.push_back(pixels[y].data_ptr<uint8_t>());
    png_read_image(png, rows.data());
    png_read_end(png, info);
    png_textp texts = nullptr;
    for (int i = png_get_text(png, info, &texts, nullptr) - 1; i >= 0; i--) {
        const std::string key = texts[i].key;
        const size_t size = std::max(texts[i].itxt_length, texts[i].text_length);
        if (key == "Raw profile type exif") found.exif = from_hex({texts[i].text, size});
        if (key == "XML:com.adobe.xmp") found.xmp = {texts[i].text, size};
    }
    png_bytep exif = nullptr;
    png_uint_32 size = 0;
    if (png_get_eXIf_1(png, info, &size, &exif))
        found.exif.assign(reinterpret_cast<char*>(exif), size);
    png_destroy_read_struct(&png, &info, nullptr);
    return upright(pixels, found.exif, found.xmp);
}

// ---- JPEG ----

struct JpegError : jpeg_error_mgr {
    jmp_buf back;
    char message[JMSG_LENGTH_MAX];
};

// Four inks, inverted, as Adobe writes them, to RGB as Pillow rounds it.
inline Tensor from_cmyk(const Tensor& pixels) {
    const Tensor values = pixels.to(torch::kInt), light = values.slice(2, 3);
    const Tensor product = (255 - values.slice(2, 0, 3)) * light + 128;
    const Tensor dark = at::bitwise_right_shift(at::bitwise_right_shift(product, 8) + product, 8);
    return (light - dark).clamp(0, 255).to(torch::kUInt8);
}

inline Tensor read_jpeg(FILE* file) {
    Tensor pixels;  // these before setjmp, so that the jump skips no constructor
    std::string exif, xmp;
    jpeg_decompress_struct jpeg;
    JpegError error;
    jpeg.err = jpeg_std_error(&error);
    error.error_exit = [](j_common_ptr broken) {  // libjpeg would end the program
        auto* error = static_cast<JpegError*>(broken->err);
        error->format_message(broken, error->message);
        longjmp(error->back, 1);
    };
    // of its warnings this one means that pixels are missing
    error.emit_message = [](j_common_ptr broken, int) {
        if (broken->err->msg_code == JWRN_JPEG_EOF) broken->err->error_exit(broken);
    };
    jpeg_create_decompress(&jpeg);
    if (setjmp(error.back)) {
        jpeg_destroy_decompress(&jpeg);
        throw Error(std::string("cannot be read as an image (") + error.message + ")");
    }
    jpeg_save_markers(&jpeg, JPEG_APP0 + 1, 0xffff);
    jpeg_stdio_src(&jpeg, file);
    jpeg_read_header(&jpeg, TRUE);
    check_pixels(jpeg.image_height, jpeg.image_width);
    const int channels = jpeg.num_components;
    if (channels != 1 && channels != 3 && channels != 4) throw Error("is a JPEG of two channels");
    jpeg.out_color_space = channels == 1 ? JCS_GRAYSCALE : channels == 3 ? JCS_RGB : JCS_CMYK;
    for (auto marker = jpeg.marker_list; marker; marker = marker->next) {
        const std::string content(reinterpret_cast<char*>(marker->data), marker->data_length);
        const std::string named("Exif\0\0", 6), adobe("http://ns.adobe.com/xap/1.0/\0", 29);
        if (content.starts_with(named)) exif += content.substr(named.size());
        if (content.starts_with(adobe)) xmp = content.substr(adobe.size());
    }
    jpeg_start_decompress(&jpeg);
    pixels = torch::empty({jpeg.output_height, jpeg.output_width, channels}, torch::kUInt8);
    while (jpeg.output_scanline < jpeg.output_height) {
        JSAMPROW row = pixels[jpeg.output_scanline].data_ptr<uint8_t>();
        jpeg_read_scanlines(&jpeg, &row, 1);
    }
    jpeg_finish_decompress(&jpeg);
    jpeg_destroy_decompress(&jpeg);
    return upright(channels == 4 ? from_cmyk(pixels) : pixels, exif, xmp);
}

// ---- PGM and PPM ----

// The header's next number, 0 where there is none; comments reach from # to the end of the line.
inline int pnm_number(FILE* file) {
    int c = std::fgetc(file), value = 0;
    for (; std::isspace(c) || c == '#'; c = std::fgetc(file))
        if (c == '#')
            while (c != '\n' && c != '\r' && c != EOF) c = std::fgetc(file);
    for (; std::isdigit(c) && value < 1 << 24; c = std::fgetc(file)) value = 10 * value + c - '0';
    return std::isspace(c) ? value : 0;  // with the one white-space character behind it
}

inline Tensor read_pnm(FILE* file) {
    std::fgetc(file);
    const int kind = std::fgetc(file), channels = kind == '5' ? 1 : 3;
    if (kind != '5' && kind != '6')
        throw Error("is no binary PGM or PPM (P5, P6); save it as one, or as PNG");
    const int64_t width = pnm_number(file), height = pnm_number(file), largest = pnm_number(file);
    if (width < 1 || height < 1 || largest < 1 || largest > 65535)
        throw Error("has a damaged PGM or PPM header");
    check_pixels(height, width);
    // values are scaled to 255, or to 65535, of which the high byte counts
    const int bytes = largest < 256 ? 1 : 2, top = (1 << 8 * bytes) - 1;
    std::vector<uint8_t> table, content(height * width * channels * bytes);
    for (int i = 0; i <= top; i++) {
        const int value = std::min<int>(top, std::nearbyint(double(i) / largest * top));
        table.push_back(bytes == 1 ? value : value >> 8);
    }
    if (std::fread(content.data(), 1, content.size(), file) != content.size())
        throw Error("the file ends too early");
    Tensor pixels = torch::empty({height, width, channels}, torch::kUInt8);
    uint8_t* target = pixels.data_ptr<uint8_t>();
    for (size_t i = 0; i < content.size(); i += bytes)
        *target++ = table[bytes == 1 ? content[i] : content[i] << 8 | content[i + 1]];
    return pixels;
}

// ---- any of them, and sizes ----

inline Tensor read_image(const std::string& path, int channels) {
    std::unique_ptr<FILE, int (*)(FILE*)> file(std::fopen(path.c_str(), "rb"), std::fclose);
    if (!file) throw Error("cannot be opened");
    const int first = std::fgetc(file.get());
    std::ungetc(first, file.get());  // a pipe cannot be rewound
    Tensor pixels;
    if (first == 0x89) pixels = read_png(file.get());
    else if (first == 0xff) pixels = read_jpeg(file.get());
    else if (first == 'P') pixels = read_pnm(file.get());
    else throw Error("is no PNG, JPEG, PGM or PPM image; save it as one of these");
    if (channels == 3 || pixels.size(2) == 1)
        return pixels.expand({-1, -1, channels}).contiguous();
    const Tensor rgb = pixels.to(torch::kInt);  // grey by ITU-R 601, as Pillow rounds it
    const Tensor grey = rgb.slice(2, 0, 1) * 19595 + rgb.slice(2, 1, 2) * 38470 +
                        rgb.slice(2, 2, 3) * 7471 + 0x8000;
    return at::bitwise_right_shift(grey, 16).to(torch::kUInt8);
}

// (A, B, channels) -> (A, size, channels): Pillow's antialiased bilinear filter, in fixed point.
inline Tensor resampled(const Tensor& pixels, int64_t size) {
    const int64_t lines = pixels.size(0), old = pixels.size(1), channels = pixels.size(2);
    const Tensor result = torch::empty({lines, size, channels}, torch::kUInt8);
    const uint8_t* source = pixels.data_ptr<uint8_t>();
    uint8_t* target = result.data_ptr<uint8_t>();
    const double scale = double(old) / size, support = std::max(scale, 1.0);
    for (int64_t x = 0; x < size; x++) {
        const double centre = (x + 0.5) * scale;
        const int64_t start = std::max<int64_t>(centre - support + 0.5, 0);
        const int64_t end = std::min<int64_t>(centre + support + 0.5, old);
        std::vector<double> weights;
        for (int64_t i = start; i < end; i++)
            weights.push_back(std::max(0.0, 1 - std::abs((i - centre + 0.5) * (1 / support))));
        const double sum = std::accumulate(weights.begin(), weights.end(), 0.0);
        std::vector<int> fixed;
        for (double weight : weights) fixed.push_back(0.5 + weight / sum * (1 << 22));
        for (int64_t line = 0; line < lines; line++)
            for (int64_t c = 0; c < channels; c++) {
                int total = 1 << 21;
                for (int64_t i = start; i < end; i++)
                    total += source[(line * old + i) * channels + c] * fixed[i - start];
                target[(line * size + x) * channels + c] = std::clamp(total >> 22, 0, 255);
            }
    }
    return result;
}

inline Tensor to_size(const Tensor& pixels, int64_t size) {
    const Tensor wide = resampled(pixels, size).transpose(0, 1).contiguous();
    return resampled(wide, size).transpose(0, 1).contiguous();
}

// Classes (h, w) -> (height, width): a pixel takes that of the one where its centre lies.
inline Tensor mask_to(const Tensor& mask, int64_t height, int64_t width) {
    auto places = [](int64_t size, int64_t old) {
        return ((2 * torch::arange(size) + 1) * old).floor_divide(2 * size);
    };
    const Tensor rows = mask.index_select(0, places(height, mask.size(0)));
    return rows.index_select(1, places(width, mask.size(1)));
}
